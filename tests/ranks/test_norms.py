"""Norms of gradients and weights: against NumPy, before clipping, on several ranks, over a resumed run."""

from __future__ import annotations

import csv
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.ranks import run_ranks

from dtrain.callbacks.param_norms import Norms, NormsFile
from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.files import StepLog
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.engine.position import TrainPosition
from dtrain.errors import AgreedError, StopRequested
from dtrain.trainer.setup import configured_engine, load_task
from dtrain.trainer.train import train_run

N, BATCH, RATE, CLIP = 19, 6, 0.1, 0.5

RECIPE = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dtrain

STEPS = []

def points():
    x = torch.randn(19, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, (x @ torch.tensor([3.0, -4.0, 5.0], dtype=torch.float64))[:, None] * 4

def build_model(kind: str = "declarative", fail_at: int = 0, scale: float = 1.0):
    net = nn.Linear(3, 1).double()
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    net.unused = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
    net.kind, net.fail_at, net.factor = kind, fail_at, scale
    STEPS.clear()
    return net

def build_dataloaders():
    return DataLoader(TensorDataset(*points()), batch_size=6), None

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, x, y):
    STEPS.append(1)
    if len(STEPS) == model.fail_at:
        raise RuntimeError("as told")
    loss = ((model(x) - y) ** 2).mean() * model.factor
    if model.kind == "imperative":
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        return loss.item()
    if model.kind == "mean":
        return dtrain.Mean(((model(x) - y) ** 2).sum(), len(x))
    return loss
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "normed.py"
    file.write_text(RECIPE)
    return file


def read(folder: Path) -> list[list[Any]]:
    with (folder / "norms.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["epoch", "step", "name", "weight_norm", "grad_norm"]
    return [[int(e), int(s), name, float(w), float(g) if g else None] for e, s, name, w, g in rows]


def trained(world: Any, recipe: str, folder: str, cases: list[list[Any]]) -> None:
    """One rank: a run of each case."""
    for number, (kind, accumulation) in enumerate(cases):
        words = [f"run.dir={folder}", f"run.name={number}", f"model.kind={kind}", f"accumulation={accumulation}"]
        words += ["batch=global", "epochs=2", f"clip_norm={CLIP}", "train.log_norms=2", "every_epochs=0"]
        train_run(load_settings(recipe, words, {}), world, "never")


def by_numpy(accumulation: int) -> list[list[Any]]:
    """The same in NumPy, over the whole global batches: the norms at each second step, before it."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64).numpy()
    y = x @ np.array([3.0, -4.0, 5.0]) * 4
    weight, bias, step = np.zeros(3), 0.0, 0
    rows: list[list[Any]] = []
    size = BATCH * accumulation
    for epoch in (1, 2):
        for start in range(0, N, size):
            step += 1
            part = slice(start, start + size)
            error = 2 * (x[part] @ weight + bias - y[part]) / len(x[part])
            by_weight, by_bias = error @ x[part], error.sum()
            if step % 2 == 0:
                rows.append([epoch, step, "weight", np.linalg.norm(weight), np.linalg.norm(by_weight)])
                rows.append([epoch, step, "bias", abs(bias), abs(by_bias)])
            length = np.sqrt(np.sum(by_weight**2) + by_bias**2)
            share = min(1.0, CLIP / (length + 1e-6))  # as torch has it
            weight, bias = weight - RATE * share * by_weight, bias - RATE * share * by_bias
    return rows


CASES = [[kind, accumulation] for kind in ("imperative", "declarative", "mean") for accumulation in (1, 2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_are_those_of_the_whole_global_batch_before_clipping(ranks: int, recipe: Path, tmp_path: Path) -> None:
    run_ranks(trained, ranks, recipe=str(recipe), folder=str(tmp_path), cases=CASES)
    for number, (kind, accumulation) in enumerate(CASES):
        found, wanted = read(tmp_path / str(number)), by_numpy(accumulation)
        assert [row[:3] for row in found] == [row[:3] for row in wanted], (kind, accumulation)
        numbers = [[row[3:] for row in rows] for rows in (found, wanted)]
        np.testing.assert_allclose(*numbers, rtol=1e-9, err_msg=f"{kind} {accumulation}")


def test_a_resumed_run_leaves_no_gap_and_no_row_twice(recipe: Path, tmp_path: Path) -> None:
    world = bring_up(cpu=True)

    def run(name: str, *words: str) -> Path:
        more = [f"run.dir={tmp_path}", f"run.name={name}", "epochs=3", "train.log_norms=1", "checkpoint.every_steps=3"]
        return train_run(load_settings(str(recipe), [*more, *words], {}), world)

    whole = run("whole")
    assert len(read(whole)) == 2 * 12
    recipe.write_text(RECIPE.replace("as told", "twice told"))
    with pytest.raises(RuntimeError, match="twice told"):
        run("cut", "model.fail_at=9")
    assert read(tmp_path / "cut")[-1][1] == 8, "two steps after the last checkpoint"
    with (tmp_path / "cut/norms.csv").open("a") as file:
        file.write("3,9,wei")  # as a full disk leaves it
    recipe.write_text(RECIPE.replace("as told", "twice told").replace("model.fail_at:", "0:"))
    words = ["run.name=cut", "accept=code"]
    train_run(load_settings(str(tmp_path / "cut/config.yaml"), words, {}), world, str(tmp_path / "cut"))
    assert (tmp_path / "cut/norms.csv").read_text() == (whole / "norms.csv").read_text()


def engine_of(recipe: Path, *words: str) -> Any:
    settings = load_settings(str(recipe), ["epochs=1", *words], {})
    return configured_engine(load_task(settings), bring_up(cpu=True), settings, epochs=1)


def test_the_step_at_which_a_run_stops_has_its_rows(recipe: Path, tmp_path: Path) -> None:
    engine = engine_of(recipe)

    def stop(place: TrainPosition) -> None:
        if place.updates == 2:
            raise StopRequested("on request")

    engine.callbacks.add(on(on_save_point=stop))
    norms = Norms(engine, 1, tmp_path)
    engine.callbacks.add(norms)
    with pytest.raises(StopRequested):
        engine.fit()
    assert [row[1] for row in read(tmp_path)] == [1, 1, 2, 2]


def test_a_step_that_is_left_out_has_no_row(recipe: Path, tmp_path: Path) -> None:
    """float16's scale is too large at first; the frozen parameter has no row."""
    recipe.write_text(RECIPE.replace(".double()", "").replace("float64", "float32"))
    engine = engine_of(recipe, "precision=fp16", "model.scale=0.05")
    batches: list[int] = []
    engine.callbacks.add(on(on_batch_start=lambda _: batches.append(1)))
    told: list[Any] = []
    norms = Norms(engine, 1, tmp_path, told.append)
    engine.callbacks.add(norms)
    engine.fit()
    assert 0 < engine.place.updates < len(batches)
    rows = read(tmp_path)
    assert [row[1:3] for row in rows] == [[n + 1, p] for n in range(engine.place.updates) for p in ("weight", "bias")]
    assert all(row[4] is not None for row in rows)
    assert len(told) == engine.place.updates


def test_trackers_get_the_norms_of_a_moment(tmp_path: Path) -> None:
    class Tracker:
        name = "fake"

        def __init__(self) -> None:
            self.got: list[Any] = []

        def log_steps(self, values: Any, step: int) -> None:
            self.got.append((values, step))

    for every, told in ((1.0, [({"norm/grad/weight": 2.0}, 0)]), (0.0, [])):
        log = StepLog(tmp_path)
        tracking = Tracking(tmp_path, log, every=every, device=torch.device("cpu"))
        tracker = Tracker()
        tracking.trackers = [tracker]  # type: ignore[list-item]
        tracking.moment({"norm/grad/weight": 2.0})
        log.close()
        assert tracker.got == told


def test_a_file_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "norms.csv"
    file.write_text("epoch,step,name,weight_norm,grad_norm\n1,2,a,1.0,1.0\n1,x,a,1.0,1.0\n1,2,a,1.0,1.0\n")
    NormsFile(file, 2).close()
    assert file.read_text() == "epoch,step,name,weight_norm,grad_norm\n1,2,a,1.0,1.0\n"


def test_a_file_that_cannot_be_had_is_told_by_all_ranks_before_they_train(
    tmp_path: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run.name=it", f"run.dir={tmp_path}"]

    def start(*more: str) -> None:
        train_run(load_settings(str(recipes / "small.py"), [*words, *more], {}), bring_up(cpu=True))

    start("epochs=1")
    (tmp_path / "it/norms.csv").mkdir()
    ended: list[RunEnd] = []
    finish = Tracking.finish

    def noted(tracking: Tracking, end: RunEnd) -> None:
        ended.append(end)
        finish(tracking, end)

    before = set(threading.enumerate())
    with monkeypatch.context() as seen:
        seen.setattr(Tracking, "finish", noted)
        with pytest.raises(AgreedError, match=r"norms\.csv"):
            start("epochs=2", "train.log_norms=1", "track.tensorboard=true")
    assert set(threading.enumerate()) <= before
    (end,) = ended  # its trackers, which were there already
    assert (end.failed, end.complete, [row["epoch"] for row in end.rows]) == (True, False, [1])
    start("epochs=2")
