"""A recipe with every hook, each of which notes that it was called; what is returned is made from the config."""

import json
import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain

noted = []


def note(name, *values):
    noted.append([name, *values])


def build_model(fault: str = ""):
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.1), nn.Linear(3, 1))
    model.fault = fault
    return model


def build_dataloaders(n: int = 24, m: int = 7):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n, 2, generator=draw)
    data, other = TensorDataset(x, x.sum(1, keepdim=True)), TensorDataset(x[:m], x[:m].sum(1, keepdim=True))
    return DataLoader(data, batch_size=4, shuffle=True), DataLoader(other, batch_size=3)


def build_optimizer(model, lr: float = 0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}


valid_step = train_step


def before_train(run):
    note("before_train", run.epoch, run.epochs, run.step)


def before_epoch(net, epoch, run):
    note("before_epoch", epoch, run.step)
    run.status(f"epoch {epoch} of hooks")
    if net.fault == "before_epoch" and epoch == 2 and run.rank == run.world_size - 1:
        raise RuntimeError("a fault before an epoch")


def after_step(step, values, epoch):
    assert not values["loss"].requires_grad
    note("after_step", epoch, step)


def after_validation(model, row):
    note("after_validation", row["epoch"], row["step"], model.training)


def after_epoch(model, row, run, **rest):
    note("after_epoch", row["epoch"], run.step, model.training, sorted(rest))
    note("weights", [float(number) for number in model[0].weight.detach().flatten()])
    if model.fault == "disagree":
        return {"own": float(run.rank)}
    if model.fault == "late" and row["epoch"] == 1:
        return None
    if model.fault == "raises" and row["epoch"] == 2 and run.rank == run.world_size - 1:
        raise RuntimeError("a fault after an epoch")
    own = {"own": dtrain.Mean(10.0 * (run.rank + 1) * row["epoch"], run.rank + 1), "same": torch.tensor([0.5])}
    return own | ({"val_main": 3} if run.is_main else {})


def after_train(model, history, run):
    note("after_train", len(history), list(history.columns[:-2]))
    _write(run)


def on_exception(error, run):
    note("on_exception", type(error).__name__)
    _write(run)


def _write(run):
    folder = os.environ.get("NOTED")
    if folder:
        Path(folder, f"rank{run.rank}.json").write_text(json.dumps(noted))


class Counts(dtrain.Callback):
    """Counts epochs, also over a resume, and ends training where it is told to."""

    def __init__(self):
        self.epochs = 0

    def after_epoch(self, model, row, run):
        self.epochs += 1
        note("counts", self.epochs)
        if model.fault == "stop" and self.epochs == 2 and run.rank == run.world_size - 1:
            run.stop("it is enough")

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def build_callbacks():
    return [Counts()]
