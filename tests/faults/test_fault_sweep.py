"""The fault sweep, in small: faults at drawn places, judged as `python tests/faults/sweep` does.

DTRAIN_TEST_SWEEP=full plays every fault twenty times on 1, 2 and 4 ranks, idle and with all cores busy.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.sweep.judge import Verdict, judge_failure, judge_screen
from faults.sweep.load import busy_cores
from faults.sweep.play import play
from faults.sweep.table import FAULTS, Case
from helpers.commands import Dtrain, children_of_tests
from helpers.hosts import missing
from helpers.sweep import FULL

# What tests/faults/test_failures.py does not play, or not on a busy machine.
FEW = [
    ("SIGKILL", 1, "idle"),
    ("reader dies at Ctrl-C", 2, "idle"),
    ("variables inherited", 1, "idle"),
    ("memory limit", 2, "busy"),
    ("exception", 4, "busy"),
    ("launcher SIGHUP", 2, "idle"),
    ("launcher SIGKILL", 2, "idle"),
    ("network cut", 2, "idle"),
    ("SIGKILL, two nodes", 2, "idle"),
    ("foreign process on the port", 4, "idle"),
    ("another recipe on node 2", 2, "idle"),
    ("port in use", 2, "idle"),
]
ALL = [
    (fault, ranks, load)
    for fault in FAULTS
    for ranks in (1, 2, 4)
    for load in ("idle", "busy")
    if ranks >= FAULTS[fault].ranks
]


@pytest.mark.timeout(3600 if FULL else 120)
@pytest.mark.parametrize(("fault", "ranks", "load"), ALL if FULL else FEW)
def test_a_fault_is_named_and_nothing_is_left(fault: str, ranks: int, load: str) -> None:
    if FAULTS[fault].how in ("nodes", "spread") and (lack := missing()):
        pytest.skip(lack)
    with busy_cores() if load == "busy" else contextlib.nullcontext():
        verdicts = [play(Case(fault, ranks, load, seed)) for seed in range(20 if FULL else 1)]
    bad = [f"{one.case.again()}: {one.problems}\n{one.screen}" for one in verdicts if one.problems]
    assert not bad, "\n\n".join(bad)


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    verdict = Verdict(Case("exception", 2, "idle", 0))
    judge_screen(verdict, ["all is well"])
    judge_failure(verdict, tmp_path)
    assert len(verdict.problems) == 3
    (tmp_path / "failure.json").write_text(
        '{"rank": 7, "epoch": 1, "step": 9, "phase": "x", "cause": "y", "others": {}}'
    )
    verdict = Verdict(Case("exception", 2, "idle", 0))
    judge_failure(verdict, tmp_path)
    assert len(verdict.problems) >= 4


WITH_A_CHILD = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
pathlib.Path("here-" + os.environ["RANK"]).write_text(str(child.pid))
time.sleep(600)
"""


def test_what_ranks_have_started_does_not_outlive_a_killed_launcher(dtrain: Dtrain) -> None:
    (dtrain.folder / "s.py").write_text(WITH_A_CHILD)
    temporary = dtrain.folder / "temporary"
    temporary.mkdir()
    launcher = dtrain.start("launch", "-n", 2, "s.py", TMPDIR=str(temporary))
    here = [dtrain.folder / f"here-{rank}" for rank in (0, 1)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in here), 60)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: children_of_tests() == [], 5)
    wait_until(lambda: not list(temporary.glob("dtrain-*")), 5)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, children_of_tests()
        time.sleep(0.05)
