"""Modules in eval mode stay so while the others train, from epoch to epoch, in a resumed run, and on several ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks, write_once
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.api.function import train_model
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine.modes import Modes
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.student = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        self.teacher.requires_grad_(False)
        self.teacher.eval()

    def forward(self, x):
        return self.student(x)


def build_model(frees: int = 0):
    model = Student()
    model.frees = frees
    return model


def build_dataloaders():
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=4), DataLoader(TensorDataset(x), batch_size=4)


def build_optimizer(model):
    return torch.optim.SGD(model.student.parameters(), lr=0.1)


def before_epoch(model, epoch):
    if epoch == model.frees:
        model.teacher.train()


def train_step(model, x):
    goal = model.teacher(x)
    return {"loss": (model(x) - goal).square().mean(), "goal": goal.mean(), "trains": float(model.teacher[1].training)}


def valid_step(model, x):
    return {"loss": (model(x) - model.teacher(x)).square().mean()}
"""


def start(folder: Path, *words: str, world: World | None = None) -> Path:
    write_once(folder / "distils.py", RECIPE, world)
    how = [f"run.dir={folder}", "run.name=it", "train.batch=global", *words]
    return train_run(load_settings(str(folder / "distils.py"), how, {}), world or bring_up(cpu=True))


def of_ranks(world: World, folder: str) -> None:
    start(Path(folder), "epochs=3", world=world)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_teacher_in_eval_mode_stays_so(tmp_path: Path, ranks: int) -> None:
    run_ranks(of_ranks, ranks, folder=str(tmp_path))
    history = read_history(tmp_path / "it")
    assert history["trains"].tolist() == [0, 0, 0]
    torch.manual_seed(42)
    known: dict[str, Any] = {}
    exec(RECIPE, known)  # noqa: S102 - the recipe above
    teacher = known["build_model"]().teacher
    x = known["build_dataloaders"]()[0].dataset.tensors[0].double().numpy()
    first, _, norm, last = teacher
    weights = [p.detach().double().numpy() for p in (first.weight, first.bias, last.weight, last.bias)]
    hidden = (x @ weights[0].T + weights[1]) / np.sqrt(
        1 + norm.eps
    )  # its statistics are those of the beginning: 0 and 1
    goal = (hidden @ weights[2].T + weights[3]).mean()
    assert history["goal"].tolist() == pytest.approx([goal] * 3, rel=1e-5)


def test_what_a_hook_changes_holds_for_the_epochs_after_it_also_in_a_resumed_run(tmp_path: Path) -> None:
    start(tmp_path, "epochs=3", "frees=2")
    run = start(tmp_path, "epochs=4", "frees=2")
    assert read_history(run)["trains"].tolist() == [0, 1, 1, 1]


SAMPLES = """

def after_epoch(model):
    model.eval()  # as a helper does that samples from a model, and puts it back as a whole
    model.train()
"""


def of_ranks_that_sample(world: World, folder: str, words: list[str]) -> None:
    recipe = write_once(Path(folder) / "samples.py", RECIPE + SAMPLES, world)
    how = [f"run.dir={folder}", "run.name=it", "train.batch=global", "epochs=3", *words]
    train_run(load_settings(str(recipe), how, {}), world)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("words", [[], ["checkpoint.every_epochs=0"], ["checkpoint.every_steps=1"]])
def test_what_a_hook_does_with_modes_after_an_epoch_changes_no_training(
    tmp_path: Path, ranks: int, words: list[str]
) -> None:
    """Not on rank 0 either, which asks for the modes to save them."""
    run_ranks(of_ranks_that_sample, ranks, folder=str(tmp_path), words=words)
    assert read_history(tmp_path / "it")["trains"].tolist() == [0, 0, 0]


class Body(nn.Module):
    def __init__(self, *, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout))
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    ("dropout", "frozen", "whole", "warned"),
    [(0.3, False, False, True), (0.0, False, False, False), (0.3, True, False, False), (0.3, False, True, False)],
)
def test_what_trains_in_eval_mode_is_a_warning(
    caplog: pytest.LogCaptureFixture, dropout: float, frozen: bool, whole: bool, warned: bool
) -> None:
    net = Body(dropout=dropout)
    (net if whole else net.body).eval()
    net.body.requires_grad_(not frozen)
    net.optimizer = torch.optim.SGD(net.parameters(), 0.1)
    seen: list[bool] = []

    def step(model: Any, x: torch.Tensor) -> Any:
        seen.append(model.body.training)
        return {"loss": model(x).square().mean()}

    with caplog.at_level(logging.WARNING):
        data = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
        train_model(
            net, 2, data, data, train_step=step, valid_step=lambda m, x: {"loss": m(x).mean()}, cpu=True, verbose=False
        )
    assert ("body: trained in eval mode" in caplog.text) is warned
    assert caplog.text.count("trained in eval mode") == warned
    assert seen == [whole] * 4, "of a net that is in eval mode as a whole, all modules train"


def test_a_net_that_is_trained_once_more_has_the_modes_of_before() -> None:
    net = Body(dropout=0.3)
    net.body.eval().requires_grad_(False)
    net.optimizer = torch.optim.SGD(net.head.parameters(), 0.1)
    data, seen = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2), list[bool]()

    def step(model: Any, x: torch.Tensor) -> Any:
        seen.append(model.body.training)
        return {"loss": model(x).square().mean()}

    for _ in range(2):
        validates = {"train_step": step, "valid_step": lambda m, x: {"loss": m(x).mean()}}
        train_model(net, 1, data, data, **validates, cpu=True, verbose=False)
        assert not net.training, "as validation leaves it"
    assert seen == [False] * 4


def test_modes_are_named_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    net[1][0].eval()
    modes = Modes(net)
    net.eval()
    modes.train()
    assert [part.training for part in net.modules()] == [True, True, True, False, True]
    assert modes.state(within=False) == ["1.0"]
    net[1].eval()
    assert modes.state(within=True) == ["1", "1.0", "1.1"]
    assert modes.state(within=False) == ["1.0"], "to ask changes nothing"
    modes.note()
    net.eval()
    modes.note()
    assert modes.state(within=False) == ["1", "1.0", "1.1"], "validation says nothing of training"
