"""`train_model(..., run=)` and `KerasModel.fit(..., run=)` in one process: a cell that is run again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.config import call_settings
from dtrain.config.calls import SCRIPT
from dtrain.errors import UsageError

SCALE = 1.0
TIMES = ["seconds", "samples_per_second"]
ends = {"at": 0, "steps": 0}


def die() -> None:
    ends["steps"] += 1
    if ends["steps"] == ends["at"]:
        raise ValueError("the kernel is gone")


def train_step(model: Any, x: Any, y: Any) -> dict[str, Any]:
    die()
    return {"loss": ((model(x) - y) ** 2).mean() * SCALE}


def valid_step(model: Any, x: Any, y: Any) -> dict[str, Any]:
    return {"loss": ((model(x) - y) ** 2).mean()}


def made(
    *, hidden: int = 4, p: float = 0.2, lr: float = 0.05, gamma: float = 0.9, size: int = 8, data: int = 0, n: int = 32
) -> SimpleNamespace:
    """All that a notebook's cells define."""
    torch.manual_seed(data)
    x = torch.randn(n + 8, 3)
    y = x.sum(1, keepdim=True)
    net = nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.Dropout(p), nn.Linear(hidden, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    return SimpleNamespace(
        net=net,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=gamma),
        train=DataLoader(TensorDataset(x[:n], y[:n]), size, shuffle=True),
        valid=DataLoader(TensorDataset(x[n:], y[n:]), 4),
    )


def trained(
    cells: SimpleNamespace, run: Path | None, epochs: int = 3, step: Any = train_step, **more: Any
) -> pd.DataFrame:
    how = {"optimizer": cells.optimizer, "scheduler": cells.scheduler, "config": {"checkpoint.every_steps": 1}}
    how |= {"run": run, "cpu": True, "verbose": False, "train_step": step, "valid_step": valid_step, **more}
    return dtrain.train_model(cells.net, epochs, cells.train, cells.valid, **how)


def fitted(cells: SimpleNamespace, run: Path | None, epochs: int = 3, **more: Any) -> pd.DataFrame:
    def loss(predictions: Any, labels: Any) -> Any:
        die()
        return ((predictions - labels) ** 2).mean()

    model = dtrain.KerasModel(cells.net, loss, optimizer=cells.optimizer, lr_scheduler=cells.scheduler)
    how = {"run": run, "cpu": True, "verbose": False, "config": {"checkpoint.every_steps": 1}, "ckpt_path": None}
    return model.fit(cells.train, cells.valid, epochs=epochs, patience=3, **{**how, **more})


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return one.drop(columns=TIMES).equals(other.drop(columns=TIMES))


def weights(cells: SimpleNamespace) -> bytes:
    return b"".join(value.numpy().tobytes() for value in cells.net.state_dict().values())


@pytest.mark.parametrize("call", [trained, fitted])
@pytest.mark.parametrize("anew", [True, False])
def test_a_cell_that_is_run_again_goes_on(tmp_path: Path, call: Any, anew: bool) -> None:
    """`anew`: the cells that make net, optimizer and data are run again, too; else the used ones are passed again."""
    ends.update(at=0)
    whole = made()
    expected = call(whole, tmp_path / "whole")
    cells = made()
    for step in (6, 5):
        ends.update(at=step, steps=0)
        with pytest.raises(ValueError, match="the kernel is gone"):
            call(cells, tmp_path / "cut")
        assert json.loads((tmp_path / "cut/failure.json").read_text())["exception"]["type"] == "ValueError"
        cells = made() if anew else cells
    ends.update(at=0)
    assert same(call(cells, tmp_path / "cut"), expected)
    assert weights(cells) == weights(whole)
    complete = made()
    ends.update(at=1, steps=0)  # nothing is trained
    assert same(call(complete, tmp_path / "cut"), expected)
    assert weights(complete) == weights(whole), "and the net has the run's weights"
    assert same(dtrain.read_history(tmp_path / "cut"), expected)
    ends.update(at=0)
    more = call(made(), tmp_path / "cut", 4)
    assert list(more["epoch"]) == [1, 2, 3, 4] and same(more.head(3), expected)


def test_another_call_is_refused_by_name_and_the_remedy_works(tmp_path: Path) -> None:
    ends.update(at=0)
    run = tmp_path / "it"
    expected = trained(made(), run, 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    for cells, how, word in (
        (made(lr=0.1), {}, "optimizer.lr was 0.05 and is 0.1 (argument optimizer)"),
        (made(gamma=0.5), {}, "scheduler.gamma was 0.9 and is 0.5 (argument scheduler)"),
        (made(hidden=5), {}, 'net["0"] = Linear(in_features=3, out_features=5)'),
        (made(p=0.3), {}, 'net["2"] = Dropout(p=0.3, inplace=False)'),
        (made(size=4), {}, "data.train.batch_size was 8 and is 4 (argument dl_train)"),
        (made(n=40), {}, "the number of train samples was 32 and is 40"),
        (made(data=1), {}, "train samples 0, 1, 2, "),
        (made(), {"seed": 3}, "train.seed was 42 and is 3 (argument seed)"),
        (made(), {"clip_norm": 1.0}, "train.clip_norm was None and is 1.0 (argument clip_norm)"),
    ):
        with pytest.raises(UsageError) as refused:
            trained(cells, run, 2, **how)
        assert word in str(refused.value), word
        assert "run.name" not in str(refused.value) and "dtrain train" not in str(refused.value), "words of the style"
    sgd = made()
    sgd.optimizer = torch.optim.SGD(sgd.net.parameters(), lr=0.05)
    sgd.scheduler = torch.optim.lr_scheduler.StepLR(sgd.optimizer, 1, gamma=0.9)
    with pytest.raises(UsageError, match=r"optimizer\.class was 'Adam' and is 'SGD' \(argument optimizer\)") as refused:
        trained(sgd, run, 2)
    assert "not given" not in str(refused.value), "what only one of the classes has is not listed"
    with pytest.raises(
        UsageError, match=r"a run of dtrain\.train_model, which dtrain\.KerasModel\.fit cannot resume\."
    ):
        fitted(made(), run, 2)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "config.yaml"}
    accept = {"checkpoint.accept": "data", "checkpoint.every_steps": 1}
    assert same(trained(made(data=1), run, 2, config=accept), expected), "as the message says"


@pytest.mark.parametrize("call", [trained, fitted])
def test_epoch_steps_hold_in_a_run_and_are_compared(tmp_path: Path, call: Any) -> None:
    ends.update(at=0)
    run = tmp_path / "it"
    without = call(made(), None, 2, epoch_steps=3, config=None)
    assert same(call(made(), run, 2, epoch_steps=3), without)
    with pytest.raises(UsageError, match=r"train\.epoch_steps was 3 and is 2 \(argument epoch_steps\)"):
        call(made(), run, 3, epoch_steps=2)
    with pytest.raises(UsageError, match=r"train\.epoch_steps was 3 and is None"):
        call(made(), run, 3)


def cell(name: str, text: str) -> dict[str, Any]:
    """Defines what a notebook's cell does: in a module without a file, whose lines Python finds as IPython has it."""
    import linecache

    lines = text.splitlines(keepends=True)
    linecache.cache[name] = (len(text), None, lines, name)
    space: dict[str, Any] = {"__name__": "a_notebook"}
    exec(compile(text, name, "exec"), space)  # noqa: S102 - as a notebook does
    return space


STEP = """
FACTOR = 2.0

class Half(__import__("torch").nn.Module):
    def forward(self, x):
        return x / 2

def train_step(model, x, y):
    return {"loss": part(model, x, y) * FACTOR}

def part(model, x, y):
    return ((model(x) - y) ** 2).mean()
"""


def test_steps_of_a_notebook_are_compared_by_their_syntax(tmp_path: Path) -> None:
    def call(text: str, name: str) -> None:
        space, cells = cell(name, text), made()
        cells.net.append(space["Half"]())
        trained(cells, tmp_path / "it", 1, space["train_step"])

    ends.update(at=0)
    call(STEP, "<ipython-input-1>")
    call(STEP.replace("* FACTOR}", "*  FACTOR}  # as before"), "<ipython-input-2>")
    for was, now, told in (
        ("* FACTOR", "* FACTOR * 2", "train_step.py has changed: train_step, line 2"),
        (".mean()", ".sum() / len(x)", "part.py has changed"),
        ("FACTOR = 2.0", "FACTOR = 3.0", "constants.py has changed: line 1: `FACTOR = 3.0`"),
        ("x / 2", "x / 3", "Half.py has changed: Half.forward"),
    ):
        with pytest.raises(UsageError, match="the code is not that of the checkpoint") as refused:
            call(STEP.replace(was, now), f"<ipython-input-{now}>")
        assert told in str(refused.value)
        assert 'config={"checkpoint.accept": "code"}' in str(refused.value)


def test_a_call_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for how, word in (
        ({"run": None}, "config= belongs to run="),
        ({"config": {"every_stepz": 3}}, "every_stepz"),
        ({"config": {"train.seed": 3}}, "argument seed="),
        ({"config": {"run.name": "x"}}, "argument run="),
        ({"config": {"optimizer.lr": 0.1}}, "argument optimizer="),
        ({"config": {"data.size": 1}}, "a call has no recipe"),
        ({"config": {"init_from": "runs/x"}}, "dtrain.load_weights(model, source)"),
        ({"config": {"train.hang_seconds": 9}}, "a call does nothing with it"),
        ({"config": {"train.epoch_steps": 9}}, "argument epoch_steps="),
        ({"config": {"checkpoint.every_steps": 0}}, "checkpoint.every_steps = 0 (argument config)"),
        ({"run": ""}, "run = ''"),
        ({"run": 3}, "run = 3"),
        ({"run": "/proc/it"}, "run = '/proc/it': cannot create /proc/it: "),
    ):
        with pytest.raises(UsageError) as refused:
            trained(made(), **{"run": tmp_path / "it", **how})
        assert word in str(refused.value), how
    assert list(tmp_path.iterdir()) == []


def test_a_scripts_run_refuses_keys_that_would_do_nothing() -> None:
    for key in ("train.clip_norm", "train.init_from", "early_stopping.patience", "checkpoint.weights"):
        with pytest.raises(UsageError, match=r"dtrain\.run does nothing with it"):
            call_settings(SCRIPT, "runs/it", {}, {key: 1})
    call_settings(SCRIPT, "runs/it", {}, {"checkpoint.every_steps": 2, "keep_last": 3})


@pytest.mark.parametrize("call", [trained, fitted])
def test_epochs_of_a_number_of_steps_are_so_in_a_run(tmp_path: Path, call: Any) -> None:
    """Four steps are a pass over the data, of which the second epoch of three goes on to the next."""
    ends.update(at=0)
    alone, kept = made(), made()
    expected = call(alone, None, config=None, epoch_steps=3)
    ends.update(at=5, steps=0)
    with pytest.raises(ValueError, match="the kernel is gone"):
        call(kept, tmp_path / "it", epoch_steps=3)
    ends.update(at=0)
    kept = made()
    assert same(call(kept, tmp_path / "it", epoch_steps=3), expected) and weights(kept) == weights(alone)
    with pytest.raises(UsageError, match=r"train.epoch_steps was 3 and is 2 \(argument epoch_steps\)"):
        call(made(), tmp_path / "it", epoch_steps=2)
