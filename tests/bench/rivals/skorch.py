"""skorch; on several ranks with its AccelerateMixin, which it calls experimental."""

from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import MeanLoss, Nine

PACKAGE = "skorch"
LAUNCH = TORCHRUN
ENV = {}


def _patch() -> None:
    """Keeps a criterion without parameters out of DDP."""
    from accelerate import Accelerator

    released = Accelerator.prepare_model

    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(p.requires_grad for p in model.parameters()):
            return model
        return released(self, model, *args, **kwargs)

    Accelerator.prepare_model = prepare_model


def _patched_nine(nine: Nine) -> Reported:
    _patch()
    return _nine(nine)


def _nine(nine: Nine) -> Reported:
    import torch
    from accelerate import Accelerator
    from skorch import NeuralNet
    from skorch.callbacks import EpochScoring
    from skorch.helper import predefined_split
    from skorch.hf import AccelerateMixin

    class Net(AccelerateMixin, NeuralNet):
        pass

    def mean(net: Any, data: Any, labels: Any) -> float:
        return float(net.predict(data).mean())

    net = Net(
        nine.net,
        criterion=MeanLoss,
        optimizer=torch.optim.SGD,
        lr=0.0,
        max_epochs=1,
        batch_size=2,
        train_split=predefined_split(nine.dataset),
        accelerator=Accelerator(cpu=True),
        callbacks=[EpochScoring(mean, name="metric")],
    )
    net.fit(nine.dataset, None)
    return Reported(net.history[-1, "valid_loss"], net.history[-1, "metric"])


NUMBERS = {"AccelerateMixin, as released": _nine, "AccelerateMixin, patched to run": _patched_nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    import torch
    from accelerate import Accelerator
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback, EpochScoring
    from skorch.helper import predefined_split
    from skorch.hf import AccelerateMixin

    class Bell(Callback):
        def on_epoch_begin(self, net: Any, **_: Any) -> None:
            if len(net.history) > 1:
                names = ("train_loss", "train_acc", "valid_loss", "valid_acc")
                loss, accuracy, val_loss, val_accuracy = net.history[-2, names]
                between(loss=loss, accuracy=accuracy, val_loss=val_loss, val_accuracy=val_accuracy)

    class Accelerated(AccelerateMixin, NeuralNetClassifier):
        pass

    net = problem.net()
    kind, more = NeuralNetClassifier, {}
    if problem.size > 1:
        _patch()
        kind, more = Accelerated, {"accelerator": Accelerator(cpu=True)}
    made = problem.optimizer(net)
    kind(
        net,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=type(made),
        lr=made.param_groups[0]["lr"],
        max_epochs=epochs + 1,
        batch_size=problem.batch_size,
        iterator_train__shuffle=True,
        train_split=predefined_split(problem.valid_set),
        callbacks=[EpochScoring("accuracy", name="train_acc", on_train=True, lower_is_better=False), Bell()],
        verbose=0,
        **more,
    ).fit(problem.train_set, None)


SPEED = {"NeuralNetClassifier": _train}
