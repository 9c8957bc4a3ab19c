"""Owners that have ended, or are elsewhere: who of them is waited for, and whose place is taken."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.owners import STARTER, left_by, let_go, line, start

from dtrain.errors import StopRequested, UsageError
from dtrain.launch.signals.owner import Owner, is_killed
from dtrain.layout import OWNER
from dtrain.rundir import lock
from dtrain.rundir.claims import living_owner
from dtrain.rundir.lock import owned

# Has the folder, and has forked off a process that lives on.
PARENT = """
import os, sys, time
from pathlib import Path
from dtrain.rundir.lock import owned
with owned(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_STALE_SECONDS", 1.0)


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_an_owner_that_was_killed_a_moment_ago_is_waited_for(tmp_path: Path) -> None:
    """Also where its parent has not asked after it: its number is still taken, by what has ended."""
    owner = start(STARTER, tmp_path, 0)
    assert [line(owner), line(owner)] == ["ready", "mine"]
    owner.kill()  # and no wait()
    with owned(tmp_path):
        assert owner.returncode is None
    let_go(owner)
    owner = start(STARTER, tmp_path, 0)
    assert [line(owner), line(owner)] == ["ready", "mine"]
    killer = threading.Timer(0.5, owner.kill)
    killer.start()
    with owned(tmp_path):
        assert killer.finished.is_set()
    killer.join()
    let_go(owner)


def test_a_kill_that_waits_for_a_process_is_seen(tmp_path: Path) -> None:
    """As the kernel tells of it: a mask, the lowest bit of which is signal 1."""
    real = Path(f"/proc/{os.getpid()}/status").read_text()
    assert re.search(r"^SigPnd:\t0{16}$", real, re.M) and re.search(r"^ShdPnd:\t0{16}$", real, re.M)
    (tmp_path / "7").mkdir()
    for mask, killed in (("0000000000000100", True), ("0000000000004000", False), ("0000000000004100", True)):
        (tmp_path / "7/status").write_text(re.sub(r"(SigPnd:\t)0{16}", rf"\g<1>{mask}", real))
        assert is_killed(7, tmp_path) is killed
    assert not is_killed(8, tmp_path)


@pytest.mark.parametrize("left", ["killed", "empty", "half", "reused"])
def test_what_a_dead_owner_left_is_taken_over(tmp_path: Path, left: str, caplog: pytest.LogCaptureFixture) -> None:
    if left == "killed":
        dead = start(STARTER, tmp_path, 0, "")
        assert [line(dead), line(dead)] == ["ready", "mine"]
        dead.kill()
        dead.communicate()
    elif left == "reused":  # this very process has the number now
        left_by(tmp_path, started=1, job="99")
    else:
        (tmp_path / OWNER).write_text("" if left == "empty" else '{"host": "no')
    began = time.monotonic()
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < lock._STALE_SECONDS / 2
    assert ("is stale, since it was killed or crashed" in caplog.text) == (left in ("killed", "reused"))
    if left == "reused":
        assert f"the lock of process {os.getpid()} on {os.uname().nodename} (job 99), since 20" in caplog.text


def test_a_child_of_a_dead_owner_does_not_keep_it(tmp_path: Path) -> None:
    parent = start(PARENT, tmp_path)
    child = int(line(parent))
    try:
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        began = time.monotonic()
        with owned(tmp_path):
            pass
        assert time.monotonic() - began < lock._STALE_SECONDS / 2
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


@pytest.mark.usefixtures("quick")
def test_an_owner_that_was_taken_over_meanwhile_says_so_and_leaves_the_other_alone(tmp_path: Path) -> None:
    """It was stopped for longer than an owner elsewhere is waited for."""
    with owned(tmp_path) as ownership:
        ownership.check()
        words = json.dumps(asdict(replace(Owner.me(), machine="another boot", host="node9")))
        (tmp_path / "new").write_text(words)
        (tmp_path / "new").replace(tmp_path / OWNER)
        assert wait_for(lambda: ownership._lost is not None)
        with pytest.raises(UsageError, match=r"taken over by process .* on node9"):
            ownership.check()
    assert (tmp_path / OWNER).read_text() == words


@pytest.mark.usefixtures("quick")
def test_a_time_that_lies_ahead_is_no_wait_of_days_and_a_request_ends_the_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by(tmp_path, machine="another boot", host="node9")
    ahead = time.time() + 2 * 86400
    os.utime(tmp_path / OWNER, (ahead, ahead))
    assert living_owner(tmp_path) is None
    asked = iter([None, None, "SIGTERM"])
    with pytest.raises(StopRequested, match=r"SIGTERM.*while waiting for the owner"):  # noqa: SIM117
        with owned(tmp_path, lambda: next(asked)):
            pass
    assert "172,8" in caplog.text
    assert "in the future and is ignored" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [OWNER]
    began = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - began < 60  # and not two days


@pytest.mark.usefixtures("quick")
def test_an_owner_elsewhere_that_shows_no_sign_of_life_is_waited_for_and_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by(tmp_path, machine="another boot", host="node9")
    began = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - began > 0.9
    assert "waiting up to 1 s for a heartbeat of process" in caplog.text
    assert "on node9, since" in caplog.text
    left_by(tmp_path, machine="another boot")
    os.utime(tmp_path / OWNER, (time.time() - 60, time.time() - 60))
    caplog.clear()
    with owned(tmp_path):
        assert "waiting" not in caplog.text


@pytest.mark.usefixtures("quick")
def test_without_locks_an_owner_elsewhere_that_lives_is_seen_by_its_touch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with owned(tmp_path):
        file = tmp_path / OWNER
        words = json.loads(file.read_text()) | {"machine": "another boot", "host": "node9"}
        file.write_text(json.dumps(words))
        began = time.monotonic()
        refused = r"is in use by process \d+ on node9, since .* choose another run.name"
        with pytest.raises(UsageError, match=refused), owned(tmp_path):
            pass
        assert time.monotonic() - began < 30
