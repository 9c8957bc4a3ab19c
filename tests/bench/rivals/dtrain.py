"""dtrain, in its three styles."""

import sys
from typing import Any

from bench.loading import Reported
from bench.problems import Nine

PACKAGE = "dtrain"
LAUNCH = (sys.executable, "-m", "dtrain", "launch", "-n", "2", "--cpu", "--")
ENV = {}


def _function_nine(nine: Nine) -> Reported:
    import dtrain

    def train_step(model: Any, values: Any, _: Any) -> Any:
        mean = model(values).mean()
        return mean, mean.detach()

    history = dtrain.train_model(
        nine.net,
        1,
        nine.loader(),
        nine.loader(),
        train_step=train_step,
        valid_step=train_step,
        optimizer=nine.optimizer(),
    )
    return Reported(*history[["val_loss", "val_metric"]].iloc[-1])


def _keras_nine(nine: Nine) -> Reported:
    import dtrain

    model = dtrain.KerasModel(nine.net)
    model.compile(loss_func=nine.loss, optimizer=nine.optimizer(), metrics_dict={"metric": nine.loss})
    history = model.fit(1, nine.loader(), nine.loader())
    return Reported(*history[["val_loss", "val_metric"]].iloc[-1])


def _evaluate_nine(nine: Nine) -> Reported:
    import dtrain

    model = dtrain.KerasModel(nine.net, nine.loss, {"metric": nine.loss})
    told = model.evaluate(nine.loader())
    return Reported(told["val_loss"], told["val_metric"])


def _script_nine(nine: Nine) -> Reported:
    import torch

    import dtrain

    net, loader = dtrain.prepare(nine.net, nine.loader())
    net.eval()
    meter = dtrain.Meter()
    with torch.no_grad():
        for values, _ in loader:
            mean = net(values).mean()
            meter.add(loss=mean, metric=mean)
    return Reported(*meter.means().values())


NUMBERS = {
    "train_model": _function_nine,
    "KerasModel.fit": _keras_nine,
    "KerasModel.evaluate": _evaluate_nine,
    "script: prepare, Meter": _script_nine,
}

_MEANS = ("loss", "accuracy", "val_loss", "val_accuracy")
