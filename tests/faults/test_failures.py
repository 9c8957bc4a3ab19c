"""Faults at random places: the right rank, step, phase and cause are named, and nothing is left running.

`python tests/faults/sweep` tries many places for each fault, on 2 and on 4 ranks.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import BIN, Dtrain

PLACES = [(2, 0)]
STEPS, BATCH = 4, 4  # of the recipe, on each rank

# fault -> cause, exit code, and what the screen must say besides the place.
SUDDEN = {
    "raise": ("exception", 1, ["ZeroDivisionError: division by zero", "raised by your code"]),
    "kill": ("killed", 1, ["was killed by SIGKILL"]),
    "exit": ("exit", 1, ["exited with code 0"]),
    "segfault": ("segfault", 1, ["Fatal Python error: Segmentation fault", "was killed by SIGSEGV"]),
    "nan": ("nan", 1, ["the loss of this step is nan", "have the indices"]),
}
HANGS = ["sleep train", "sleep valid", "stop train"]


@dataclass(frozen=True)
class Spot:
    """Where a fault happens."""

    ranks: int
    rank: int
    epoch: int
    step: int

    def words(self) -> list[str]:
        length = STEPS * BATCH * self.ranks
        place = (f"model.{name}={getattr(self, name)}" for name in ("rank", "epoch", "step"))
        # Which is the last checkpoint must not depend on how far the writing of one has got.
        more = ["epochs=2", "run.name=it", "checkpoint.asynchronous=false", f"length={length}"]
        return ["-n", str(self.ranks), "--cpu", *more, *place]


def a_spot(case: str, ranks: int, seed: int) -> Spot:
    draw = random.Random(f"{case} {seed}")
    return Spot(ranks, draw.randrange(ranks), draw.randint(1, 2), draw.randint(1, STEPS))


def failure_of(dtrain: Dtrain) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dtrain.folder / "runs/it/failure.json").read_text())
    return found


def assert_named(dtrain: Dtrain, spot: Spot, phase: str, cause: str, screen: str) -> dict[str, Any]:
    found = failure_of(dtrain)
    told = {name: found[name] for name in ("rank", "local_rank", "epoch", "step", "phase", "cause")}
    place = {"rank": spot.rank, "local_rank": spot.rank, "epoch": spot.epoch, "step": spot.step}
    assert told == {**place, "phase": phase, "cause": cause}, screen
    assert found["host"] == os.uname().nodename
    assert found["device"].startswith("cpu")
    assert sorted(found["others"]) == sorted(str(r) for r in range(spot.ranks) if r != spot.rank)
    last = dtrain.folder / "runs/it/checkpoints/epoch-1" if spot.epoch == 2 else None
    assert found["checkpoint"] == (None if last is None else str(last))
    assert f"epoch {spot.epoch}, {phase} step {spot.step}" in screen
    assert f"last checkpoint: {last or 'none yet'}" in screen
    assert "/dtrain/engine/loop.py" not in found["traceback"]
    return found


@pytest.mark.parametrize(("ranks", "seed"), PLACES)
@pytest.mark.parametrize("fault", SUDDEN)
def test_a_rank_that_ends_of_a_sudden(dtrain: Dtrain, recipes: Path, fault: str, ranks: int, seed: int) -> None:
    cause, code, told = SUDDEN[fault]
    spot = a_spot(fault, ranks, seed)
    imperative = f"imperative={'true' if seed % 2 else 'false'}"
    done = dtrain("train", recipes / "faults.py", f"model.fault={fault}", imperative, *spot.words())
    assert done.code == code, done.text
    found = assert_named(dtrain, spot, "train", cause, done.err)
    for part in [*told, f"at rank {spot.rank}, epoch"]:
        assert part in done.err, done.text
    assert done.err.count("dtrain: error") == 1, done.err
    if fault in ("raise", "segfault"):
        assert "faults.py" in found["traceback"]
        assert "train_step" in found["traceback"]
    if fault == "raise":
        assert found["exception"] == {"type": "ZeroDivisionError", "message": "division by zero"}
    if fault == "nan":
        first = ((spot.step - 1) * ranks + spot.rank) * BATCH
        assert f"indices {first}, {first + 1}, {first + 2}, {first + 3} in the dataset" in done.err


@pytest.mark.parametrize(("ranks", "seed"), PLACES)
@pytest.mark.parametrize("case", HANGS)
def test_a_rank_that_stands_still(dtrain: Dtrain, recipes: Path, case: str, ranks: int, seed: int) -> None:
    fault, phase = case.split()
    spot = a_spot(case, ranks, seed)
    words = [f"model.fault={fault}", f"model.phase={phase}", "hang_seconds=2", *spot.words()]
    done = dtrain("train", recipes / "faults.py", *words)
    assert done.code == 76, done.text
    found = assert_named(dtrain, spot, phase, "hang", done.err)
    assert f"a hang was stopped: rank {spot.rank} has been in epoch" in done.err
    stacks = (dtrain.folder / "runs/it/stacks.txt").read_text()
    assert stacks.count("=== rank") == ranks
    if fault == "sleep":
        assert "in fall_silent" in found["traceback"]
        assert "fall_silent" in stacks
        assert all("is waiting for the other ranks" in how for how in found["others"].values()), found["others"]
    else:
        assert "is stopped (SIGSTOP" in done.err


@pytest.mark.parametrize(("ranks", "seed"), PLACES)
def test_a_loader_worker_that_stands_still(dtrain: Dtrain, recipes: Path, ranks: int, seed: int) -> None:
    spot = a_spot("worker", ranks, seed)
    spot = Spot(ranks, spot.rank, 1, spot.step)
    bad = ((spot.step - 1) * ranks + spot.rank) * BATCH + 1
    words = [f"data.bad={bad}", "data.fault=sleep", "workers=1", "hang_seconds=2", *spot.words()]
    done = dtrain("train", recipes / "faults.py", *words)
    assert done.code == 76, done.text
    found = assert_named(dtrain, spot, "train", "hang", done.err)
    assert "in __getitem__" in found["traceback"]


@pytest.mark.parametrize(
    "words", [["model.fault=work", "model.phase=valid"], ["model.fault=write", "model.phase=checkpoint"]]
)
def test_slow_work_is_no_hang(dtrain: Dtrain, recipes: Path, words: list[str]) -> None:
    spot = Spot(2, 0, 1, 1)
    done = dtrain("train", recipes / "faults.py", *words, "hang_seconds=2", *spot.words(), "epochs=1")
    assert done.code == 0, done.text
    assert done.err == ""
    assert not (dtrain.folder / "runs/it/failure.json").exists()


def test_one_process_and_other_launchers_leave_word_too(dtrain: Dtrain, recipes: Path) -> None:
    words = ["epochs=2", "length=32", "model.fault=raise", "model.epoch=2", "model.step=1"]
    alone = dtrain("train", recipes / "faults.py", *words, "run.name=alone", "batch_size=8", "--cpu")
    assert alone.code == 1
    found = json.loads((dtrain.folder / "runs/alone/failure.json").read_text())
    assert [found[name] for name in ("rank", "epoch", "step", "phase", "cause")] == [0, 2, 1, "train", "exception"]
    assert found["checkpoint"] == str(dtrain.folder / "runs/alone/checkpoints/epoch-1")
    assert "at rank 0, epoch 2, train step 1" in alone.err
    assert f"last checkpoint: {found['checkpoint']}\n" in alone.err
    launcher = [BIN / "torchrun", "--nproc-per-node", "2", "-m", "dtrain"]
    done = dtrain.run(
        *launcher,
        "train",
        recipes / "faults.py",
        *words,
        "model.rank=1",
        "run.name=it",
        "--cpu",
        ACCELERATE_USE_CPU="true",
    )
    assert done.code == 1
    found = failure_of(dtrain)
    assert [found[name] for name in ("rank", "epoch", "step", "cause")] == [1, 2, 1, "exception"]


def test_a_batch_that_is_no_number_is_skipped_on_all_ranks(dtrain: Dtrain, recipes: Path) -> None:
    spot = a_spot("skip", 2, 0)
    words = ["nan=skip", "data.fault=nan", "data.bad=9", "accumulation=2", *spot.words()]
    done = dtrain("train", recipes / "faults.py", *words)  # that the ranks' weights stay alike, the engine checks
    assert done.code == 0, done.text
    rows = (dtrain.folder / "runs/it/history.csv").read_text().splitlines()
    assert len(rows) == 3
    assert "nan" not in "".join(rows), rows
