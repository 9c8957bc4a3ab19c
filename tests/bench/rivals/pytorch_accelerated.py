"""pytorch-accelerated's Trainer; its metrics come from a callback, as in its documentation."""

from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import MeanLoss, Nine

PACKAGE = "pytorch-accelerated"
LAUNCH = TORCHRUN
ENV = {"ACCELERATE_USE_CPU": "true"}  # else each rank is a world of its own on a CPU machine


def _nine(nine: Nine, gathers: bool) -> Reported:
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import TrainerCallback
    from torchmetrics import MeanMetric

    class Metric(TrainerCallback):
        def __init__(self) -> None:
            self.metric = MeanMetric()

        def on_eval_step_end(self, trainer: Any, batch: Any, batch_output: Any, **_: Any) -> None:
            predictions = batch_output["model_outputs"]
            self.metric.update(trainer.gather(predictions, padding_value=-100) if gathers else predictions)

        def on_eval_epoch_end(self, trainer: Any, **_: Any) -> None:
            trainer.run_history.update_metric("metric", self.metric.compute().item())
            self.metric.reset()

    trainer = Trainer(nine.net, MeanLoss(), nine.optimizer(), callbacks=(Metric(),))
    trainer.evaluate(nine.dataset, per_device_batch_size=2)
    told = trainer.run_history.get_latest_metric
    return Reported(told("evaluation_loss"), told("metric"))


NUMBERS = {
    "evaluate; torchmetrics callback": lambda nine: _nine(nine, gathers=False),
    "evaluate; callback that gathers": lambda nine: _nine(nine, gathers=True),
}


def _train(problem: Any, epochs: int, between: Any) -> None:
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import TrainerCallback

    from bench.hand import Sums

    class Accuracy(TrainerCallback):
        """Sums on each rank, one gather a pass."""

        def __init__(self) -> None:
            self.sums = {"train": Sums(), "eval": Sums()}

        def _add(self, split: str, batch: Any, output: Any) -> None:
            self.sums[split].add(output["loss"], output["model_outputs"], batch[1])

        def _close(self, split: str, trainer: Any) -> None:
            _, hits, count = trainer.gather(self.sums[split].packed()[None]).sum(dim=0).tolist()
            trainer.run_history.update_metric(f"{split}_accuracy", hits / count)
            self.sums[split] = Sums()

        def on_train_step_end(self, trainer: Any, batch: Any, batch_output: Any, **_: Any) -> None:
            self._add("train", batch, batch_output)

        def on_eval_step_end(self, trainer: Any, batch: Any, batch_output: Any, **_: Any) -> None:
            self._add("eval", batch, batch_output)

        def on_train_epoch_end(self, trainer: Any, **_: Any) -> None:
            self._close("train", trainer)

        def on_eval_epoch_end(self, trainer: Any, **_: Any) -> None:
            self._close("eval", trainer)

        def on_training_run_epoch_end(self, trainer: Any, **_: Any) -> None:
            told = trainer.run_history.get_latest_metric
            between(
                loss=told("train_loss_epoch"),
                accuracy=told("train_accuracy"),
                val_loss=told("eval_loss_epoch"),
                val_accuracy=told("eval_accuracy"),
            )

    net = problem.net()
    trainer = Trainer(net, problem.loss_func, problem.optimizer(net), callbacks=(Accuracy(),))
    trainer.train(
        problem.train_set,
        epochs,
        problem.valid_set,
        per_device_batch_size=problem.batch_size,
        train_dataloader_kwargs={"num_workers": 0, "pin_memory": False, "drop_last": False},
        eval_dataloader_kwargs={"num_workers": 0, "pin_memory": False},
    )


SPEED = {"Trainer": _train}
