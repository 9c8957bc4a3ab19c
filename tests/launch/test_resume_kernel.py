"""Runs that a notebook keeps: the kernel is killed at any time, and the same cell in a new kernel resumes.

DTRAIN_TEST_SWEEP=full pytest tests/launch/test_resume_kernel.py    # fifty kills of each style
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from helpers.commands import Dtrain
from helpers.notebooks import run_notebook
from helpers.sweep import FULL, some
from nbclient.exceptions import DeadKernelError

KILLS = 50 if FULL else 1
STEPS = 3 * (6 + 2)  # of the program: three epochs of six batches and two of validation
# The kernel itself is killed: by its number of steps, or some time after it has imported torch.
CELL = """
import os, signal, sys, threading
sys.path.insert(0, {recipes!r})
os.environ["DIE"] = "{step}"
import calls
if {seconds}:
    threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGKILL)).start()
calls.main({style!r}, {run!r}, 3)
"""


def told(text: str) -> str:
    return text.partition("<<<")[2].partition(">>>")[0]


def in_a_kernel(folder: Path, recipes: Path, style: str, run: str, step: int = 0, seconds: float = 0.0) -> str | None:
    """Returns what a cell prints in a kernel of its own; None where that was killed."""
    cell = CELL.format(recipes=str(recipes), style=style, run=run, step=step, seconds=seconds)
    try:
        (shown,) = run_notebook([cell], folder)
    except DeadKernelError:
        return None
    assert shown.error == ("", ""), shown.shown
    return told(shown.out)


@pytest.mark.timeout(7200 if FULL else 300)
@pytest.mark.parametrize("style", some(["keras"], ["train_model", "script"]))
def test_a_killed_kernel_loses_nothing(dtrain: Dtrain, recipes: Path, style: str) -> None:
    done = dtrain.run("python", str(recipes / "calls.py"), style, "runs/whole")
    assert done.code == 0, done.text
    whole, draw, kills = told(done.text), random.Random(5), 0
    while kills < KILLS:
        if FULL and draw.random() < 0.5:
            end = in_a_kernel(dtrain.folder, recipes, style, "runs/cut", seconds=draw.uniform(0.05, 1.5))
        else:
            end = in_a_kernel(dtrain.folder, recipes, style, "runs/cut", draw.randint(1, STEPS // 2))
        kills += end is None
        if end is not None:
            assert end == whole, f"after {kills} kills"
            shutil.rmtree(dtrain.folder / "runs/cut")  # once more, from the beginning
    assert in_a_kernel(dtrain.folder, recipes, style, "runs/cut") == whole, f"after {kills} kills"
