"""A run's folder has one owner: races, crashes, other machines, file systems without locks."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import clean_environment

from dtrain import lock
from dtrain.errors import UsageError
from dtrain.launch.owner import Owner, is_killed
from dtrain.lock import FILE_NAME, owned

# Comes at a common moment, and says whether it got the folder; keeps it until it may go.
STARTER = """
import sys, time
from pathlib import Path
from dtrain import lock
if "nolocks" in sys.argv:
    import errno
    def flock(*_): raise OSError(errno.ENOLCK, "no locks")
    lock.fcntl.flock = flock
from dtrain.errors import UsageError
folder, begin = Path(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
time.sleep(max(0, begin - time.time()))
try:
    with lock.owned(folder):
        print("mine", flush=True)
        sys.stdin.readline()
except UsageError as error:
    print(error, flush=True)
"""

# Has the folder, and has forked off a process that lives on.
PARENT = """
import os, sys, time
from pathlib import Path
from dtrain.lock import owned
with owned(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    print(child, flush=True)
    time.sleep(600)
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=30)


def left_by(folder: Path, **more: Any) -> Owner:
    """Words of an owner that is gone."""
    owner = replace(Owner.me(), token="gone", **more)
    (folder / FILE_NAME).write_text(json.dumps(asdict(owner)))
    return owner


@pytest.mark.parametrize("kind", ["locks", "nolocks"])
def test_of_several_starters_exactly_one_gets_it(tmp_path: Path, kind: str) -> None:
    begin = time.time() + 2
    starters = [start(STARTER, tmp_path, begin, kind) for _ in range(6)]
    assert [line(one) for one in starters] == ["ready"] * 6
    said = [line(one) for one in starters]
    assert said.count("mine") == 1, said
    owner = starters[said.index("mine")]
    for words in said:
        assert words == "mine" or f"is in use by process {owner.pid} on {os.uname().nodename}" in words
    for one in starters:
        let_go(one)
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path):
        pass


def test_of_several_that_take_over_exactly_one_does(tmp_path: Path) -> None:
    owner = left_by(tmp_path, pid=1 << 22, job="99")
    starters = [start(STARTER, tmp_path, time.time() + 2, "") for _ in range(6)]
    assert [line(one) for one in starters] == ["ready"] * 6
    assert [line(one) for one in starters].count("mine") == 1
    assert json.loads((tmp_path / FILE_NAME).read_text())["token"] != owner.token
    for one in starters:
        let_go(one)


def test_a_second_one_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with owned(tmp_path):
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), owned(tmp_path):
            pass
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


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


def test_it_is_released_after_a_failure_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


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
        (tmp_path / FILE_NAME).write_text("" if left == "empty" else '{"host": "no')
    began = time.monotonic()
    with owned(tmp_path):
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 2
    assert ("has ended without a word; taken over" in caplog.text) == (left in ("killed", "reused"))
    if left == "reused":
        assert f"was left by process {os.getpid()} on {os.uname().nodename} (job 99), since 20" in caplog.text


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
        assert time.monotonic() - began < 2
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_STALE_SECONDS", 1.0)


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.usefixtures("quick")
def test_an_owner_elsewhere_that_shows_no_sign_of_life_is_waited_for_and_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by(tmp_path, machine="another boot", host="node9")
    began = time.monotonic()
    with owned(tmp_path):
        assert 0.9 < time.monotonic() - began < 3
    assert "waiting up to 1 s for a sign of life of process" in caplog.text
    assert "on node9, since" in caplog.text
    left_by(tmp_path, machine="another boot")
    os.utime(tmp_path / FILE_NAME, (time.time() - 60, time.time() - 60))
    began = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - began < 0.5


@pytest.mark.usefixtures("quick")
def test_without_locks_an_owner_elsewhere_that_lives_is_seen_by_its_touch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with owned(tmp_path):
        file = tmp_path / FILE_NAME
        words = json.loads(file.read_text()) | {"machine": "another boot", "host": "node9"}
        file.write_text(json.dumps(words))
        began = time.monotonic()
        refused = r"is in use by process \d+ on node9, since .* choose another run.name"
        with pytest.raises(UsageError, match=refused), owned(tmp_path):
            pass
        assert time.monotonic() - began < 1
