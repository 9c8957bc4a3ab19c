"""Lightning's Trainer, with what it recommends for several ranks: self.log(sync_dist=True) and torchmetrics."""

from functools import partial
from typing import Any

from bench.loading import PYTHON, Reported
from bench.problems import Nine

PACKAGE = "lightning"
LAUNCH = PYTHON  # it starts the second rank itself
ENV = {}
_QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def _nine(nine: Nine) -> Reported:
    import lightning as pl
    from torchmetrics import MeanMetric

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.metric = nine.net, MeanMetric()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(batch[0]).mean()

        def validation_step(self, batch: Any, _: int) -> None:
            predictions = self.net(batch[0])
            self.metric.update(predictions)
            self.log("val_loss", predictions.mean(), sync_dist=True)
            self.log("val_metric", self.metric)

        def configure_optimizers(self) -> Any:
            return nine.optimizer()

    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, num_sanity_val_steps=0, **_QUIET)
    trainer.fit(Module(), nine.loader(), nine.loader())
    return Reported(*(trainer.callback_metrics[name].item() for name in ("val_loss", "val_metric")))


NUMBERS = {"sync_dist; torchmetrics": _nine}


def _logging(problem: Any) -> type:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_func = problem.net(), problem.loss_func

        def _step(self, batch: Any, prefix: str) -> Any:
            predictions = self.net(batch[0])
            loss = self.loss_func(predictions, batch[1])
            self._note(prefix, loss, predictions, batch[1])
            return loss

        def _note(self, prefix: str, loss: Any, predictions: Any, labels: Any) -> None:
            means = {f"{prefix}loss": loss, f"{prefix}accuracy": problem.accuracy(predictions, labels)}
            self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))

        def training_step(self, batch: Any, _: int) -> Any:
            return self._step(batch, "")

        def validation_step(self, batch: Any, _: int) -> None:
            self._step(batch, "val_")

        def configure_optimizers(self) -> Any:
            return problem.optimizer(self.net)

    return Module


def _summing(problem: Any) -> type:
    from bench.hand import Sums

    class Summing(_logging(problem)):
        def __init__(self) -> None:
            super().__init__()
            self.sums = {"": Sums(), "val_": Sums()}

        def _note(self, prefix: str, *values: Any) -> None:
            self.sums[prefix].add(*values)

        def _log_sums(self, prefix: str) -> None:
            loss, hits, count = self.all_gather(self.sums[prefix].packed()).reshape(-1, 3).sum(dim=0)
            self.log_dict({f"{prefix}loss": loss / count, f"{prefix}accuracy": hits / count})
            self.sums[prefix] = Sums()

        def on_train_epoch_end(self) -> None:
            self._log_sums("")

        def on_validation_epoch_end(self) -> None:
            self._log_sums("val_")

    return Summing


def _train(problem: Any, epochs: int, between: Any, module: Any) -> None:
    import lightning as pl

    class Bell(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, _: Any) -> None:
            means = trainer.callback_metrics
            if means:
                between(**{name: means[name].item() for name in ("loss", "accuracy", "val_loss", "val_accuracy")})

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=problem.size,
        strategy="ddp" if problem.size > 1 else "auto",
        max_epochs=epochs + 1,
        num_sanity_val_steps=0,
        callbacks=[Bell()],
        **_QUIET,
    )
    trainer.fit(module(problem)(), problem.train_loader(), problem.valid_loader())


SPEED = {
    "self.log at each step": partial(_train, module=_logging),
    "self.log once an epoch": partial(_train, module=_summing),
}
