"""The only rank is supervised as several are: what ends it is named, and nothing outlives it."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from helpers.apart import STUCK, trainer, write_recipe
from helpers.commands import BIN
from helpers.running import Running, running, wait_for
from helpers.terminals import on_terminal

from dtrain.errors import WorldError
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.forked import Fork


@contextmanager
def training(folder: Path, then: str, *words: str, **env: str) -> Iterator[Running]:
    """Trains one rank, which does something from its fifth step on."""
    write_recipe(folder, then)
    with running(folder, "train", "recipe.py", "epochs=2", "run.name=one", *words, **env) as one:
        yield one


def test_a_trainer_that_is_killed_is_named_and_leaves_no_worker(tmp_path: Path) -> None:
    with training(tmp_path, STUCK, "data.workers=2") as one:
        one.until("trainer-0")
        killed = trainer(tmp_path, 0)
        workers = killed.children(recursive=True)
        assert len(workers) >= 2
        killed.kill()
        assert one.end() == 1
        assert "was killed by SIGKILL" in one.text
        assert "other ranks" not in one.text  # there are none
        psutil.wait_procs(workers, timeout=10)
        assert not [worker for worker in workers if worker.is_running()]
    assert (tmp_path / "runs/one/failure.json").exists()


def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with training(tmp_path, STUCK, "data.workers=2") as one:
        one.until("trainer-0")
        all_of_them = psutil.Process(one.process.pid).children(recursive=True)
        assert len(all_of_them) >= 3
        one.send(signal.SIGKILL)
        gone, alive = psutil.wait_procs(all_of_them, timeout=20)
        assert not alive, gone


def test_a_trainer_that_does_not_stop_on_request_is_ended(tmp_path: Path) -> None:
    with training(tmp_path, STUCK, "train.stop_seconds=1") as one:
        one.until("trainer-0")
        one.send(signal.SIGTERM)
        assert one.end() == 128 + signal.SIGTERM
        assert "train.stop_seconds" in one.text


def test_a_hang_of_the_only_rank_is_ended_and_its_line_named(tmp_path: Path) -> None:
    with training(tmp_path, STUCK, "train.hang_seconds=2") as one:
        one.until("trainer-0")
        assert one.end() == 76
    found = re.search(
        r"has been in epoch 1, train step 5 for (\d+) s: it is in .*recipe.py:\d+, in train_step", one.text
    )
    assert found, one.text
    assert int(found[1]) < 40  # at 2 s, and not at 60, when even one that works is no longer waited for


@pytest.mark.parametrize("how", ["--no-supervisor", "traced"])
def test_it_can_do_without_one(tmp_path: Path, how: str) -> None:
    words = (how,) if how.startswith("--") else ()
    then = "assert os.getpid() == int(os.environ['STARTED']), os.environ['STARTED']"
    write_recipe(tmp_path, then)
    (tmp_path / "go.py").write_text(
        "import os, sys\n"
        "os.environ['STARTED'] = str(os.getpid())\n"
        "from dtrain.cli import main\n" + ("sys.setprofile(lambda *_: None)\n" if how == "traced" else "") + "main()\n"
    )
    with running(tmp_path, "go.py", "train", "recipe.py", "epochs=1", *words, program=Path(sys.executable).name) as one:
        assert one.end() == 0, one.text


def test_the_trainer_is_a_process_of_its_own_with_the_same_environment(tmp_path: Path) -> None:
    then = (
        "ours = {'RANK', 'WORLD_SIZE', 'DTRAIN_SUPERVISOR_PID', 'DTRAIN_REPORT_DIR', 'DTRAIN_HANG_SECONDS'}; "
        "assert not ours & set(os.environ), ours & set(os.environ); "
        "assert os.getsid(0) == os.getpid() != int(os.environ['SHELL_SID'])"
    )
    with training(tmp_path, then, SHELL_SID=str(os.getsid(0))) as one:
        assert one.end() == 0, one.text
    assert (tmp_path / "runs/one/logs").is_dir()


def test_breakpoint_is_no_hang_and_ctrl_z_stops_the_trainer(tmp_path: Path) -> None:
    write_recipe(tmp_path, "if steps[0] == 5: breakpoint()")
    words = ("train", "recipe.py", "epochs=2", "run.name=one", "train.hang_seconds=1", "--log-format", "plain")
    with on_terminal([BIN / "dtrain", *words], tmp_path, columns=120) as (process, terminal):
        terminal.until(lambda: "(Pdb)" in terminal.text, "the debugger's prompt")
        stopped = trainer(tmp_path, 0)
        hung = time.monotonic() + 4
        terminal.until(lambda: time.monotonic() > hung, "several times train.hang_seconds")
        terminal.type("p 6 * 7\n")
        terminal.until(lambda: "42" in terminal.lines, "the debugger's answer")
        process.send_signal(signal.SIGTSTP)  # as Ctrl-Z does
        wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED, "the trainer is stopped, too")
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: stopped.status() != psutil.STATUS_STOPPED, "it continues")
        terminal.type("c\n")
        terminal.until(lambda: "next: dtrain evaluate" in terminal.text, "the end")
        terminal.to_the_end()
        assert process.wait(60) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_ends_of_children_are_ignored_the_launcher_hears_of_them_all_the_same(tmp_path: Path, ranks: int) -> None:
    write_recipe(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "go.py").write_text(
        "import os, signal, sys\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nos.execv(sys.argv[1], sys.argv[1:])\n"
    )
    words = ("go.py", BIN / "dtrain", "train", "recipe.py", "run.name=one", "--cpu", "-n", ranks)
    with running(tmp_path, *words, program=Path(sys.executable).name) as one:
        assert one.end() == 1
    assert "was killed by SIGKILL" in one.text


OUTSIDE = """
import os, sys
from dtrain.launch import forked
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.supervisor import run_forked_rank, told

def fails(*_):
    raise OSError(28, "no room for it")

def work():
    {work}

{before}
sys.exit(told(run_forked_rank(work, RankFacts(), hang_seconds=None, stop_seconds=None, caught=())))
"""


@pytest.mark.parametrize(
    ("work", "before", "said"),
    [
        ("raise RuntimeError('outside')", "", r"go\.py\", line \d+, in work\n(?s:.*)RuntimeError: outside"),
        ("sys.exit(0)", "", r"error: your code called sys.exit\(0\)"),
        ("pass", "forked.end_with_parent = fails", "no room for it"),
        ("raise RuntimeError('outside')", "forked.write_report = fails", "RuntimeError: outside"),
        ("pass", "", "the training process exited with code 1 without reporting a cause"),
    ],
)
def test_whatever_ends_the_trainer_before_or_after_its_work_is_said(
    tmp_path: Path, work: str, before: str, said: str
) -> None:
    (tmp_path / "go.py").write_text(OUTSIDE.replace("{work}", work).replace("{before}", before))
    with running(tmp_path, "go.py", program=Path(sys.executable).name) as one:
        assert one.end() == 1
    assert re.search(said, one.text), one.text


def test_where_no_process_can_be_started_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    start = Fork(lambda: None, RankFacts())
    monkeypatch.setattr(os, "fork", fails)
    with pytest.raises(WorldError, match=r"temporarily unavailable\. See `ulimit -u` .* --no-supervisor"):
        start("reports", 1, 2)
