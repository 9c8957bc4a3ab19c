"""The parts of failures that explain themselves: heartbeats, hangs, the first cause, tracebacks."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.engine.position import TrainPosition
from dtrain.files import identity_of
from dtrain.launch.monitor import hang_watch as hangs
from dtrain.launch.monitor import postmortem, processes
from dtrain.launch.monitor.exit_report import ExceptionInfo, Report, read_reports
from dtrain.launch.monitor.hang_watch import ExitWatch, HangWatch
from dtrain.launch.monitor.heartbeat import DONE, Beat, Heartbeat, own_heartbeat, read_beat
from dtrain.launch.monitor.postmortem import PostMortem, SupervisorState, last_checkpoint
from dtrain.launch.monitor.processes import Activity, activity, catches, family
from dtrain.launch.monitor.stack_dump import busy_worker, crash_text, main_stack, users_part, waits_for_others

# --- heartbeats -------------------------------------------------------------------------------------------


def test_a_place_writes_through_to_what_the_supervisor_reads(tmp_path: Path) -> None:
    assert read_beat(tmp_path, 3) == Beat()
    first = Heartbeat(tmp_path / "rank-3.beat")
    first.enter("setup")
    assert str(read_beat(tmp_path, 3)) == "setup"
    place = TrainPosition(3, heartbeat=Heartbeat(tmp_path / "rank-3.beat"))  # another object, the same file
    place.heartbeat.computes_on("cuda:1")
    place.enter("valid", 2)
    place.advance()
    place.advance()
    assert read_beat(tmp_path, 3) == Beat(4, "valid", 2, 2, "cuda:1")
    assert str(read_beat(tmp_path, 3)) == "epoch 2, valid step 2"


def test_without_a_supervisor_there_is_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRAIN_REPORT_DIR", raising=False)
    assert own_heartbeat() is None
    assert TrainPosition(0).heartbeat is None


def test_a_beat_takes_less_than_a_microsecond(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "rank-0.beat")
    heartbeat.enter("train", 1)
    best = math.inf
    for _ in range(100):  # the best of many, and the thread's own time, since the machine may be busy
        started = time.thread_time()
        for step in range(1000):
            heartbeat.step(step)
        best = min(best, time.thread_time() - started)
    assert best / 1000 < 1e-6


# --- hangs ------------------------------------------------------------------------------------------------

WAITS = 'Thread 0x1 (most recent call first):\n  File "/x-packages/torch/distributed/distributed_c10d.py", line 1 in all_reduce\n'
SLEEPS = (
    'Thread 0x1 (most recent call first):\n  File "mine.py", line 9 in nap\n  File "mine.py", line 3 in train_step\n'
)


class Bench:
    """Ranks whose beats, use of the machine and stacks a test sets, on a clock that it moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, stacks: dict[int, str], limit: float) -> None:
        self.now, self.used, self.asked = 0.0, dict.fromkeys(stacks, Activity()), 0
        self.as_they_answer: Callable[[], None] = lambda: None
        self.beats = {rank: Heartbeat(folder / f"rank-{rank}.beat") for rank in stacks}
        for beat in self.beats.values():
            beat.enter("train", 1)
        self.watch = HangWatch(folder, limit, clock=lambda: self.now)
        monkeypatch.setattr(hangs, "activity", lambda pid: self.used[pid])
        monkeypatch.setattr(hangs, "_CONFIRM_SECONDS", 0.0)

        def ask(_folder: Path, ranks: dict[int, int]) -> dict[int, str]:
            self.asked += 1
            self.as_they_answer()
            return {rank: stacks[rank] for rank in ranks}

        monkeypatch.setattr(hangs, "ask_for_stacks", ask)

    def until(self, end: float, busy: dict[int, Activity] | None = None) -> hangs.Hang | None:
        """Moves the clock on; who is busy uses that much more each second."""
        while self.now < end:
            self.now += 1.0
            for rank, more in (busy or {}).items():
                was = self.used[rank]
                self.used[rank] = Activity(was.seconds + more.seconds, was.moved + more.moved, more.stuck_in_kernel)
            found = self.watch.check({rank: rank for rank in self.beats})
            if found is not None:
                return found
        return None


def test_the_rank_that_does_not_wait_for_others_is_the_culprit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, tmp_path, {0: WAITS, 1: SLEEPS, 2: WAITS}, 60)
    assert bench.until(59) is None
    found = bench.until(100)
    assert found is not None
    assert found.rank == 1
    assert found.seconds < 65  # it is looked at every twentieth of the limit
    since = f"in epoch 1, train for {found.seconds:.0f} s"
    assert found.why[1] == f"{since}: it is in mine.py:9, in nap"
    assert found.why[0] == f"{since}: it is waiting for the other ranks, in all_reduce()"


@pytest.mark.parametrize("busy", [Activity(seconds=0.2), Activity(moved=100_000), Activity(stuck_in_kernel=True)])
def test_who_works_is_waited_for_ten_times_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, busy: Activity
) -> None:
    bench = Bench(monkeypatch, tmp_path, {0: SLEEPS, 1: WAITS}, 60)
    assert bench.until(599, {0: busy}) is None
    assert 2 < bench.asked < 50, "a rank that waits is asked now and then"
    found = bench.until(700, {0: busy})
    assert found is not None
    assert found.rank == 0


def test_a_little_use_is_no_work_and_a_beat_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, tmp_path, {0: SLEEPS}, 60)
    polls = {0: Activity(seconds=0.0005, moved=8)}
    bench.until(40, polls)
    bench.beats[0].step(1)
    assert bench.until(99, polls) is None
    found = bench.until(110, polls)
    assert found is not None
    assert "train step 1" in found.why[0]


def test_who_goes_on_while_the_ranks_are_asked_is_no_culprit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, tmp_path, {0: SLEEPS, 1: WAITS}, 60)
    bench.as_they_answer = lambda: bench.beats[0].step(bench.asked)
    assert bench.until(300) is None
    assert bench.asked


def test_all_waiting_for_each_other_is_a_hang_and_done_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, tmp_path, {0: WAITS, 1: WAITS}, 60)
    bench.until(5)
    bench.beats[1].step(1)
    found = bench.until(200)
    assert found is not None
    assert found.rank == 0, "the one that is furthest behind"
    bench = Bench(monkeypatch, tmp_path, {0: SLEEPS}, 60)
    bench.beats[0].enter(DONE)
    assert bench.until(5000) is None
    off = Bench(monkeypatch, tmp_path, {0: SLEEPS}, 0)
    assert off.until(5000) is None


def test_this_process_is_known() -> None:
    used = activity(os.getpid())
    assert used is not None
    assert used.seconds > 0
    assert used.moved > 0
    assert not used.stopped
    assert os.getpid() in family(os.getpid())
    assert catches(os.getpid(), signal.SIGINT)
    assert not catches(os.getpid(), signal.SIGUSR2)
    assert activity(2**22 + 1) is None


def test_stacks_are_read_as_faulthandler_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "rank-0.crash"
    with file.open("w") as out:
        faulthandler.dump_traceback(out, all_threads=True)
    frames = main_stack(file.read_text())
    assert (frames[0].file, frames[0].name) == (__file__, "test_stacks_are_read_as_faulthandler_writes_them")
    assert not waits_for_others(frames)
    assert __file__ in crash_text(tmp_path, 0)
    assert crash_text(tmp_path, 1) == ""
    inner = '  File "/v/site-packages/torch/nn/f.py", line 2 in linear\n'
    ours = f'  File "{Path(hangs.__file__).parents[1] / "engine.py"}", line 2 in fit\n'
    folded = users_part(
        main_stack("Thread 0x1 (most recent call first):\n" + inner * 2 + '  File "m.py", line 1 in f\n' + ours)
    )
    assert folded == "  ... 2 frames of torch\n  m.py:1, in f"
    worker = (
        'Thread 0x1 (most recent call first):\n  File "m.py", line 7 in __getitem__\n  File "w.py", line 1 in fetch\n'
    )
    assert busy_worker(f"{SLEEPS}\nworker 7:\n{WAITS}\nworker 8:\n{worker}")[0].line == "7"
    assert main_stack(f"{SLEEPS}\nworker 8:\n{worker}")[0].name == "nap"


# --- the first cause --------------------------------------------------------------------------------------


def report(rank: int, when: float, cause: str = "exception") -> Report:
    return Report(rank, 1, f"text of {rank}", when, ExceptionInfo(cause, "RuntimeError", "words", ""))


@pytest.mark.parametrize(
    ("ended", "silent", "reports", "all_ran", "first"),
    [
        ({0: 1, 1: 1}, (), [report(1, 1.0), report(0, 2.0)], 0.0, "text of 1"),
        ({0: 1, 1: 1}, (), [report(0, 1.0, "peer"), report(1, 2.0)], 0.0, "text of 1"),
        ({0: 1, 1: -9}, (1,), [report(0, 1.0, "peer")], 0.5, "rank 1 was killed by SIGKILL"),
        ({0: 1, 1: -9}, (1,), [report(0, 1.0)], 2.0, "text of 0"),
        ({0: -6, 1: 1}, (0,), [report(1, 1.0)], 0.5, "text of 1"),
        ({0: -6, 1: -9}, (0, 1), [], 0.5, "rank 1 was killed by SIGKILL"),
        ({0: -6}, (0,), [report(1, 1.0, "peer")], 0.5, "rank 0 was killed by SIGABRT"),
    ],
)
def test_the_first_cause_is_reported(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ended: dict[int, int],
    silent: tuple[int, ...],
    reports: list[Report],
    all_ran: float,
    first: str,
) -> None:
    monkeypatch.setattr(postmortem, "read_reports", lambda _: reports)
    verdict = PostMortem(tmp_path, range(2)).verdict(SupervisorState(ended, silent, all_ran=all_ran))
    code, text = verdict.exit_code, verdict.text
    assert code == 1
    assert first in text


def test_nothing_is_told_where_all_went_well(tmp_path: Path) -> None:
    well = PostMortem(tmp_path, range(2)).verdict(SupervisorState({0: 0, 1: 0}))
    assert (well.exit_code, well.text) == (0, "")
    assert read_reports(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((0, 0), (1, 1), "the cgroup's memory limit"),
        ((2, 5), (2, 6), "The machine ran out of memory"),
        ((2, 5), (2, 5), ""),
    ],
)
def test_a_kill_for_want_of_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], told: str
) -> None:
    counts = iter([before, after])
    monkeypatch.setattr(postmortem, "out_of_memory_kills", lambda: next(counts))
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "run.txt").write_text(json.dumps({"folder": str(run), "identity": identity_of(run)}))
    post_mortem = PostMortem(tmp_path, range(1))
    verdict = post_mortem.verdict(SupervisorState({0: -9}, (0,)))
    assert verdict.failure is not None
    assert f"  full report: {run / 'failure.json'}" in post_mortem.leave(verdict.failure)
    found = postmortem.read_failure(run)
    assert found is not None
    assert found["cause"] == ("out_of_memory" if told else "killed")
    assert told in verdict.text


def test_the_kernel_counts_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(processes, "_CGROUP", tmp_path)
    assert processes.out_of_memory_kills()[0] == 2


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("epoch-2", "epoch-10", ".epoch-11.part", "epoch-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoints/epoch-10")
    for name, last in (("epoch-11-step-9", True), ("epoch-11-step-10", True), ("epoch-10-step-30", False)):
        (tmp_path / "checkpoints" / name).mkdir()
        assert (last_checkpoint(tmp_path) == str(tmp_path / "checkpoints" / name)) == last


def test_ranks_of_one_node_may_all_wait_for_another_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, tmp_path, {0: WAITS, 1: WAITS}, 60)
    bench.watch = HangWatch(tmp_path, 60, clock=lambda: bench.now, alone=False)
    assert bench.until(590) is None
    assert bench.until(700) is not None


def test_what_waits_longer_leaves_every_hang_to_the_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for limit in (2, 60, 600):
        bench = Bench(monkeypatch, tmp_path, {0: SLEEPS, 1: WAITS}, limit)
        assert bench.until(hangs.outlasting(limit) - 30, {0: Activity(1.0), 1: Activity(1.0)}) is not None
    assert hangs.outlasting(0) == hangs.outlasting(1e12) > 20 * 86400, "for ever, as far as torch counts"


# In a process of its own: the tests' own process has children (a pool of ranks, a browser) that may read and end meanwhile.
_READS_ITSELF = """
import os, sys
from dtrain.launch.signals.process_exit import _Used
used = _Used()
first = used(os.getpid())
for _ in range(50):
    last = used(os.getpid())
assert abs(last.moved - first.moved) < 2000, (first, last)
assert last.seconds - first.seconds < 1.0, (first, last)
with open(sys.argv[1], "wb") as file:
    file.write(bytes(1_000_000))
last = used(os.getpid())
assert last.moved - first.moved > 900_000, (first, last)
"""


def test_what_a_process_reads_of_itself_is_no_work(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _READS_ITSELF, tmp_path / "file"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("works", "limits", "ends"), [(True, (10, 5), (100, 50)), (False, (10, 5), (10, 5)), (False, (0, 5), (None, 5))]
)
def test_a_rank_that_has_left_its_last_word_is_given_a_time_to_exit(
    works: bool, limits: tuple[float, float], ends: tuple[float | None, float]
) -> None:
    clock = [0.0]
    watch = ExitWatch(*limits, clock=lambda: clock[0], used=lambda _: Activity(seconds=clock[0] if works else 0.0))
    first: dict[int, float] = {}
    for _ in range(500):
        clock[0] += 0.5
        for rank in watch.overdue({0: 1, 1: 2}, {0: True, 1: False}):
            first.setdefault(rank, clock[0])
    for rank, end in enumerate(ends):
        assert (first.get(rank) is None) if end is None else end < first[rank] < end + 3
