"""torchkeras' KerasModel, as released and with what keeps it from running on several ranks put right.

As released, `fit` hands the metrics to Accelerate, which wraps them in DDP. The patch keeps modules without a
parameter to learn out of it, and no more: the numbers are torchkeras' own.
"""

import sys
from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import Nine

PACKAGE = "torchkeras"
LAUNCH = TORCHRUN
ENV = {"TQDM_DISABLE": "1"}  # there is no argument that takes the bar away


def _patch() -> None:
    from accelerate import Accelerator

    released = Accelerator.prepare_model

    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(p.requires_grad for p in model.parameters()):
            return model
        return released(self, model, *args, **kwargs)

    Accelerator.prepare_model = prepare_model


def _nine(nine: Nine) -> Reported:
    from torchkeras import KerasModel
    from torchmetrics import MeanMetric

    model = KerasModel(nine.net, nine.loss, {"metric": MeanMetric()}, nine.optimizer())
    history = model.fit(nine.loader(), nine.loader(), epochs=1, plot=False, cpu=True)
    if history is None:  # on ranks other than 0
        history = model.history
    return Reported(float(list(history["val_loss"])[-1]), float(list(history["val_metric"])[-1]))


def _patched_nine(nine: Nine) -> Reported:
    _patch()
    return _nine(nine)


NUMBERS = {"fit, as released": _nine, "fit, patched to run": _patched_nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    import torchkeras
    from torchkeras import kerasmodel
    from torchmetrics import Accuracy

    if problem.size > 1:
        _patch()

    class Model(torchkeras.KerasModel):
        class StepRunner(kerasmodel.StepRunner):
            """One is made for each pass: a train one begins an epoch. Callbacks run on rank 0 alone."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                if self.stage == "train" and model.history:
                    last = {name.removeprefix("train_"): values[-1] for name, values in model.history.items()}
                    between(**{name: last[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")})

    net = problem.net()
    metrics = {"accuracy": Accuracy("multiclass", num_classes=10, average="micro")}
    model = Model(net, problem.loss_func, metrics, problem.optimizer(net))
    # Its checkpoints cannot be switched off; a score that is best in the first epoch makes one alone.
    model.fit(
        problem.train_loader(),
        problem.valid_loader(),
        epochs=epochs + 1,
        monitor="epoch",
        patience=sys.maxsize,
        plot=False,
        cpu=True,
    )


SPEED = {"fit": _train}
