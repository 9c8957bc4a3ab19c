"""Composer. Its last release holds torch below 2.7.1 and does not install beside dtrain: this was never run."""

import sys
from pathlib import Path
from typing import Any

from bench.loading import Reported
from bench.problems import Nine

PACKAGE = "mosaicml"
MISSING = "not installed: pip install mosaicml (0.32.1 needs torch<2.7.1)"
LAUNCH = (str(Path(sys.executable).with_name("composer")), "-n", "2", "--master_port", "{port}")
ENV = {}


def _nine(nine: Nine) -> Reported:
    from composer import ComposerModel, Trainer
    from composer.utils import dist
    from torchmetrics import MeanMetric

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mean = nine.net, MeanMetric()

        def forward(self, batch: Any) -> Any:
            return self.net(batch[0])

        def loss(self, outputs: Any, batch: Any) -> Any:
            return nine.loss(outputs, batch[1])

        def get_metrics(self, is_train: bool) -> dict[str, Any]:
            return {} if is_train else {"metric": self.mean}

        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
            metric.update(outputs)

    dist.initialize_dist("cpu")
    loader = nine.loader(dist.get_sampler(nine.dataset, shuffle=False))
    trainer = Trainer(model=Model(), eval_dataloader=loader, device="cpu", progress_bar=False)
    trainer.eval()
    return Reported(None, trainer.state.eval_metrics["eval"]["metric"].compute().item())


NUMBERS = {"eval; torchmetrics": _nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    from composer import Callback, ComposerModel, Trainer
    from composer.metrics import CrossEntropy
    from composer.utils import dist
    from torchmetrics import Accuracy, MetricCollection

    def metrics() -> Any:
        accuracy = Accuracy("multiclass", num_classes=10, average="micro")
        return MetricCollection({"loss": CrossEntropy(), "accuracy": accuracy})

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.found = problem.net(), {True: metrics(), False: metrics()}

        def forward(self, batch: Any) -> Any:
            return self.net(batch[0])

        def loss(self, outputs: Any, batch: Any) -> Any:
            return problem.loss_func(outputs, batch[1])

        def get_metrics(self, is_train: bool) -> dict[str, Any]:
            return dict(self.found[is_train])

        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
            metric.update(outputs, batch[1])

    class Bell(Callback):
        def eval_end(self, state: Any, logger: Any) -> None:
            train, valid = state.train_metrics, state.eval_metrics["eval"]
            means = {name: train[name].compute().item() for name in ("loss", "accuracy")}
            between(**means, **{f"val_{name}": valid[name].compute().item() for name in ("loss", "accuracy")})

    if problem.size > 1:
        dist.initialize_dist("cpu")
    model = Model()
    Trainer(
        model=model,
        train_dataloader=problem.train_loader(dist.get_sampler(problem.train_set, shuffle=True)),
        eval_dataloader=problem.valid_loader(dist.get_sampler(problem.valid_set, shuffle=False)),
        optimizers=problem.optimizer(model.net),
        max_duration=f"{epochs}ep",
        device="cpu",
        progress_bar=False,
        callbacks=[Bell()],
    ).fit()


SPEED = {"Trainer": _train}
