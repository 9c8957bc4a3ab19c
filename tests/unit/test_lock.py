"""A run's folder has one owner: races, claims, what is in the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import clean_environment
from helpers.owners import STARTER, claimed_by, left_by, let_go, line, start

from dtrain.errors import DtrainError, UsageError
from dtrain.launch.signals.owner import Owner
from dtrain.layout import HISTORY, OWNER
from dtrain.rundir import lock
from dtrain.rundir.claims import claim_after, end_of, living_owner
from dtrain.rundir.history import History
from dtrain.rundir.lock import owned

# Owns the folder again and again; whoever finds somebody else inside says so.
VISITOR = (
    STARTER.partition("folder, begin")[0]
    + """
folder, times = Path(sys.argv[1]), int(sys.argv[2])
inside = folder / "inside"
print("ready", flush=True)
sys.stdin.readline()
done = overlaps = 0
until = time.monotonic() + 30
while done < times and time.monotonic() < until:
    try:
        with lock.owned(folder):
            try:
                inside.touch(exist_ok=False)
            except FileExistsError:
                overlaps += 1
                continue
            time.sleep(0.01)
            inside.unlink()
            done += 1
    except UsageError:
        pass
print(done, overlaps, flush=True)
"""
)


@pytest.mark.parametrize("kind", ["locks", "nolocks", "alone hosts"])
def test_of_several_starters_exactly_one_gets_it(tmp_path: Path, kind: str) -> None:
    begin = time.time() + 2
    starters = [start(STARTER, tmp_path, begin, *kind.split()) for _ in range(6)]
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


@pytest.mark.parametrize("kind", ["locks", "alone hosts"])
def test_of_several_that_take_over_exactly_one_does(tmp_path: Path, kind: str) -> None:
    owner = left_by(tmp_path, pid=1 << 22, job="99")
    starters = [start(STARTER, tmp_path, time.time() + 2, *kind.split()) for _ in range(6)]
    assert [line(one) for one in starters] == ["ready"] * 6
    assert [line(one) for one in starters].count("mine") == 1
    assert json.loads((tmp_path / OWNER).read_text())["token"] != owner.token
    for one in starters:
        let_go(one)


def test_nobody_is_ever_inside_with_another(tmp_path: Path) -> None:
    """Where each host's locks are its own: what settles it is who creates a name."""
    visitors = [start(VISITOR, tmp_path, 15, "alone") for _ in range(4)]
    assert [line(one) for one in visitors] == ["ready"] * 4
    said = [one.communicate("\n", timeout=60)[0] for one in visitors]
    assert said == ["15 0\n"] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_was_made_for_an_owner_who_had_gone_is_withdrawn(tmp_path: Path) -> None:
    """Two that found the same dead owner: the later one must not end up inside, however late it comes."""
    late = lock.Ownership(tmp_path, lambda: None)
    claimed_by(tmp_path, OWNER, "dead")
    seen = end_of(tmp_path)
    assert seen is not None
    with owned(tmp_path):
        assert not late._took_over(seen)
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == [OWNER]
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_was_created_a_moment_ago_is_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not there yet when this one looked."""
    looks = iter([None])
    with owned(tmp_path):
        with monkeypatch.context() as patched:
            patched.setattr(lock, "end_of", lambda folder: next(looks, end_of(folder)))
            with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), owned(tmp_path):
                pass
        assert [path.name for path in tmp_path.iterdir()] == [OWNER]


def test_what_starters_left_that_were_killed_on_the_way_is_taken_over_and_tidied(tmp_path: Path) -> None:
    claimed_by(tmp_path, OWNER, "first")
    claimed_by(tmp_path, claim_after("first"), "second")  # killed between its claim and owner.lock
    claimed_by(tmp_path, claim_after("other"), "third")
    claimed_by(tmp_path, ".owner-4711.part", "fourth")
    (tmp_path / ".owner-folder").mkdir()  # by no starter
    with owned(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".owner-folder", OWNER]
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_without_hard_links_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    claimed_by(tmp_path, OWNER, "first")
    with owned(tmp_path):
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), owned(tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [OWNER]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_moved_is_no_longer_owned(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with owned(tmp_path / "a") as ownership:
        (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(DtrainError, match="a was removed, moved or replaced during training"):
            ownership.check()
        (tmp_path / "a").mkdir()
        with pytest.raises(DtrainError, match="or replaced"):
            ownership.check()


def test_a_row_for_a_folder_that_goes_while_it_is_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    history = History.resumed(tmp_path / "a" / HISTORY, [])
    with owned(tmp_path / "a") as ownership:

        def owns_it_still() -> None:
            ownership.check()
            (tmp_path / "a").rename(tmp_path / "b")  # right after it was looked at

        history.guard = owns_it_still
        with pytest.raises(DtrainError, match="a was removed, moved or replaced during training"):
            history.append({"epoch": 1})


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dangling"])
def test_what_is_no_file_in_its_place_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run").mkdir()
    victim, place = tmp_path / "victim", tmp_path / "run" / OWNER
    victim.write_text("mine")
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"owner.lock: it is a .*Remove that file"), owned(tmp_path / "run"):
        pass
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"host": 1},
        {"pid": "../1"},
        {"pid": -1},
        {"started": 1e9},
        {"since": float("inf")},
        {"since": 1e300},
        {"token": "a/b", "pid": 0},
        {"machine": ["x"]},
        {"host": "\x1b[2J"},
        {"extra": 1},
    ],
)
def test_odd_words_are_no_owner(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / OWNER).write_text(json.dumps(asdict(Owner.me()) | {"pid": 1 << 22} | more))
    assert living_owner(tmp_path) is None
    with owned(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [OWNER]


def test_a_second_one_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with owned(tmp_path):
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), owned(tmp_path):
            pass
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_after_a_failure_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# Takes a folder and gives it up, killed before or after each system call on the way, as often as there are any; each
# time, the next one gets the folder at once, and nothing is left of the dead one.
KILLED = """
import fcntl, json, logging, os, shutil, signal, sys, time
from pathlib import Path
from helpers.owners import claimed_by
from dtrain.layout import OWNER
from dtrain.rundir.claims import claim_after
from dtrain.rundir.lock import owned

logging.disable(logging.CRITICAL)
CALLS = "open link unlink replace write fsync close fstat stat".split()


def killed_at(at, after):
    count = iter(range(1, 10_000))

    def watched(real):
        def call(*args, **named):
            number = next(count)
            if number == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **named)
            finally:
                if number == at and after:
                    os.kill(os.getpid(), signal.SIGKILL)
        return call

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    fcntl.flock = watched(fcntl.flock)


def ends_whole(folder, kind, at, after):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if kind != "new":
        claimed_by(folder, OWNER, "first")
    if kind == "chain":
        claimed_by(folder, claim_after("first"), "second")
    child = os.fork()
    if child == 0:
        killed_at(at, after)
        with owned(folder):
            pass
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    with owned(folder):
        assert os.listdir(folder) == [OWNER], (at, after, os.listdir(folder))
    assert os.listdir(folder) == [], (at, after, os.listdir(folder))
    return code == 0


folder, kind, after = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "after"
at = 1
while not ends_whole(folder, kind, at, after):
    at += 1
print(at - 1)
"""


@pytest.mark.parametrize(("kind", "when", "least"), [("new", "after", 30), ("chain", "before", 60)])
def test_killed_at_any_system_call_it_leaves_nothing_in_the_way(
    tmp_path: Path, kind: str, when: str, least: int
) -> None:
    helpers = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "x"), kind, when],
        env=clean_environment(PYTHONPATH=helpers),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= least, "as many calls as there are"


def test_a_second_link_to_what_a_starter_writes_is_no_claim(tmp_path: Path) -> None:
    """Somebody who may write into the folder makes one, or a probe for links could not be removed."""
    with owned(tmp_path):
        late = lock.Ownership(tmp_path, lambda: None)
        late._prepare()
        os.link(tmp_path / late._part, tmp_path / "planted")
        assert not late._claim(OWNER)
        assert json.loads((tmp_path / OWNER).read_text())["token"] != late._me.token
        late._close()
