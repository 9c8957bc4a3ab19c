"""How processes end that the user's code keeps from ending, or ends by itself: ranks without torch, for the most
part."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.running import running, wait_for

from dtrain.launch.monitor.exit_report import RankIdentity, Report, write_report
from dtrain.launch.supervisor import JobEnd, run_local_ranks

# A rank as dtrain's own are, without torch: BODY is the user's code.
PROGRAM = """
import atexit, ctypes, json, os, resource, signal, subprocess, sys, threading, time
sys.path.insert(0, {root!r})
from dtrain.launch.monitor.describe import explain
from dtrain.launch.signals.lifeline import end_with_parent
from dtrain.launch.monitor.exit_report import fix_identity, write_report

fix_identity()
end_with_parent()
RANK = int(os.environ["RANK"])
try:
    exec(sys.argv[1])
    write_report(0, "")
except BaseException as error:
    found = explain(error)
    write_report(found.exit_code, found.text, found.told)
    sys.exit(found.exit_code)
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    program = tmp_path / "rank.py"
    program.write_text(PROGRAM.format(root=str(Path(sys.modules["dtrain"].__file__ or "").parents[1])))
    return program


def run(program: Path, body: str, *, hang_seconds: float = 0.5, stop_seconds: float | None = 60.0) -> JobEnd:
    return run_local_ranks([str(program), body], 2, hang_seconds=hang_seconds, stop_seconds=stop_seconds)


KEPT = {
    "thread": (
        "threading.Thread(target=time.sleep, args=(60,), name='mine').start()",
        "the thread 'mine', which is no",
    ),
    "exit function": ("atexit.register(time.sleep, 60)", "an exit function, or code below Python"),
    "below Python, with the lock": ("atexit.register(ctypes.PyDLL(None).sleep, 60)", "an exit function, or code below"),
    "child of multiprocessing": (
        "import multiprocessing as m; m.get_context('fork').Process(target=time.sleep, args=(60,), name='c').start()",
        "the child process 'c' (pid",
    ),
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_rank_that_has_done_its_work_and_does_not_exit_is_ended(
    kept: str, ranks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body, words = KEPT[kept]
    ending = run(ranks, f"if RANK == 1: {body}")
    assert (ending.exit_code, ending.text) == (0, "")
    told = capfd.readouterr().err
    assert told.count("dtrain: warning: rank 1 had finished but did not exit for train.hang_seconds") == 1, told
    assert words in told
    assert "rank 0" not in told


def test_a_rank_that_failed_and_does_not_exit_is_the_cause(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.launch.supervisor._GRACE_SECONDS", 0.3)
    body = "if RANK: time.sleep(60)\natexit.register(time.sleep, 60)\nraise ValueError('mine')"
    ending = run(ranks, body, hang_seconds=0)
    assert ending.exit_code == 1
    assert "ValueError: mine" in ending.text


@pytest.mark.parametrize("code", [0, 2, 75, 7])
def test_an_exit_code_of_the_users_own_is_a_failure_and_means_nothing_else(code: int, ranks: Path) -> None:
    ending = run(ranks, f"RANK or time.sleep(60)\nos._exit({code})")
    assert ending.exit_code == (7 if code == 7 else 1)
    assert f"rank 1 exited with code {code} without reporting a cause" in ending.text


def test_a_report_vouches_for_no_other_exit_code(ranks: Path) -> None:
    assert run(ranks, "atexit.register(os._exit, 75)").exit_code == 0, "its work was done"
    assert run(ranks, "atexit.register(os._exit, 0)\nraise ValueError").exit_code == 1
    assert run(ranks, "write_report(75, 'stopped'); os._exit(75)").exit_code == 75
    assert run(ranks, "write_report(75, 'stopped'); os._exit(75)", stop_seconds=None).exit_code == 75


LIMITS = {
    "files": "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "sizes": "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    "descriptors": "os.closerange(0, 1000)",
    "environment": "os.environ.clear()",
    "another rank": "os.environ.update(RANK='5', WORLD_SIZE='9', DTRAIN_REPORT_DIR='/nonexistent')",
    "umask": "os.umask(0o777)",
    "folder": "os.mkdir('gone'); os.chdir('gone'); os.rmdir(os.getcwd())",
    "streams": "sys.stdout = sys.stderr = None",
    "signals": "[signal.signal(s, signal.SIG_IGN) for s in (15, 2, 10, 12)]",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_cause_is_told_whatever_the_users_code_has_taken_away(
    limit: str, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ending = run(ranks, f"RANK or time.sleep(60)\n{LIMITS[limit]}\nraise ValueError('mine')")
    assert ending.exit_code == 1
    assert "ValueError: mine" in ending.text
    assert "ValueError, raised by your code" in ending.text


def test_a_last_word_is_cut_to_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.launch.monitor import exit_report as reports

    (tmp_path / "rank-3.json").mkdir()  # where the report cannot be written
    word = reports._map_report(tmp_path, 3)
    monkeypatch.setattr(reports, "_fixed", [RankIdentity(3, 4, tmp_path)])
    monkeypatch.setattr(reports, "_last_word", [word])
    assert reports.read_reports(tmp_path) == []
    for text in ("mine", "\U0001f600" * 100_000, "\udcff" * 100_000):
        write_report(1, text, reports.ExceptionInfo("exception", "ValueError", text, text))
        (found,) = reports.read_reports(tmp_path)
        assert isinstance(found, Report)
        assert (found.rank, found.exit_code, found.text[:4]) == (3, 1, text[:4])


@pytest.mark.parametrize("number_of_ranks", [1, 2])
def test_a_request_arrives_although_the_recipe_has_handlers_of_its_own(
    number_of_ranks: int, tmp_path: Path, recipes: Path
) -> None:
    long = (recipes / "long.py").read_text()
    taken = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: print('theirs'))\n"
    own = long.replace('    mark("train")\n', '    mark("train")\n    signal.signal(signal.SIGUSR1, signal.SIG_DFL)\n')
    (tmp_path / "mine.py").write_text(taken + own)
    with running(tmp_path, "train", "mine.py", "--cpu", "-n", number_of_ranks, "epochs=1000", "run.name=it") as one:
        wait_for(
            lambda: "SIGUSR1: dtrain's handler was replaced" in one.text or one.process.poll(), "the second warning"
        )
        one.send(signal.SIGTERM)
        assert one.end() == 75, one.text
        found = re.findall(r"dtrain: warning: (\w+): dtrain's handler was replaced by (.*?), so ", one.text)
        assert found == [
            ("SIGTERM", f"<lambda> ({tmp_path / 'mine.py'}:2)"),
            ("SIGUSR1", "the default action (SIG_DFL)"),
        ]
        assert "theirs" not in one.text


def test_a_process_alone_is_ended_too(tmp_path: Path, recipes: Path) -> None:
    body = (
        "import atexit, multiprocessing, threading, time\n"
        "fork = multiprocessing.get_context('fork')\n"
        "def train_step(model, x, y):\n"
        "    if not multiprocessing.active_children():\n"
        "        fork.Process(target=time.sleep, args=(60,), daemon=True).start()\n"
        "        fork.Process(target=time.sleep, args=(60,), name='child').start()\n"
        "        threading.Thread(target=time.sleep, args=(60,), name='mine').start()\n"
        "    return (model(x) - y).square().mean()\n"
    )
    (tmp_path / "mine.py").write_text((recipes / "long.py").read_text() + body)
    words = ["train", "mine.py", "--cpu", "epochs=1", "run.name=it", "train.hang_seconds=1"]
    with running(tmp_path, *words) as one:
        assert one.end(90) == 0, one.text
        assert "the training process had finished but did not exit for train.hang_seconds" in one.text
        assert "the thread 'mine', which is not a daemon; the child process 'child' (pid" in one.text


ALONE = """
import os, sys
sys.path.insert(0, {root!r})
from dtrain.launch.signals.exiting import report_os_exit, reserve_standard_descriptors

os.close(1)
reserve_standard_descriptors()
with open("own.txt", "w") as own:
    os.write(1, b"printed")
    own.write("mine")
with report_os_exit():
    if os.fork() == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
    os._exit({code})
"""


@pytest.mark.parametrize("code", [0, 75])
def test_without_a_supervisor_os_exit_is_told_and_no_end_of_dtrains_own(code: int, tmp_path: Path) -> None:
    program = tmp_path / "alone.py"
    program.write_text(ALONE.format(root=str(Path(sys.modules["dtrain"].__file__ or "").parents[1]), code=code))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"dtrain: error: os._exit({code}) was called" in done.stderr
    assert f"{program}:15, in <module>" in done.stderr
    assert (tmp_path / "own.txt").read_text() == "mine"


CALLER = """
import pathlib, sys
sys.path.insert(0, {root!r})
from dtrain.launch.signals.left_behind import own_folder
from dtrain.launch.supervisor import run_local_ranks

with own_folder("call-") as name:
    (pathlib.Path(name) / "data").write_bytes(bytes(1000))
    run_local_ranks([sys.argv[1], "open('up', 'a').write('x'); time.sleep(60)"], 2, relayed=True)
"""


def test_a_caller_that_is_killed_leaves_no_folder(ranks: Path, tmp_path: Path) -> None:
    caller, temporary = tmp_path / "caller.py", tmp_path / "tmp"
    caller.write_text(CALLER.format(root=str(Path(sys.modules["dtrain"].__file__ or "").parents[1])))
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, caller, ranks], cwd=tmp_path, env=environment)
    try:
        up = tmp_path / "up"
        wait_for(lambda: up.exists() and len(up.read_text()) == 2, "both ranks run")
        assert len(list(temporary.glob("dtrain-*"))) == 2
        wait_for(lambda: len(children_of(process.pid)) == 3, "the reaper has the folders' names")
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: list(temporary.iterdir()) == [], "the folders are gone")


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()
