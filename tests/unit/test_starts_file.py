"""`starts.jsonl`: what is noted of a start and its end, and that reading it takes whatever there is."""

from __future__ import annotations

import errno
import getpass
import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
from helpers.runs import a_start
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import StopRequested
from dtrain.layout import STARTS
from dtrain.rundir.claims import living_owner
from dtrain.rundir.lock import owned
from dtrain.rundir.starts import commit_of, here, noted, read_starts


def play(folder: Path, how: BaseException | None, epochs: list[int]) -> None:
    with noted(folder, {"ranks": 2}, lambda: epochs[-1]):
        epochs.append(epochs[-1] + 3)
        if how is not None:
            raise how


def test_each_start_and_how_it_ended(tmp_path: Path) -> None:
    epochs = [0]
    with pytest.raises(StopRequested):
        play(tmp_path, StopRequested("on request (SIGTERM)"), epochs)
    with pytest.raises(ZeroDivisionError):
        play(tmp_path, ZeroDivisionError("line one\nline two"), epochs)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, KeyboardInterrupt(), epochs)
    play(tmp_path, None, epochs)
    starts = read_starts(tmp_path)
    assert [(one.before, one.why, one.epoch, one.text) for one in starts] == [
        (0, "stopped", 3, "on request (SIGTERM)"),
        (3, "failed", 6, "ZeroDivisionError: line one"),
        (6, "failed", 9, "KeyboardInterrupt: "),
        (9, "complete", 12, ""),
    ]
    times = [time for one in starts for time in (one.at, one.ended)]
    assert times == sorted(times)
    assert all(one.facts["ranks"] == 2 for one in starts)


def test_a_start_without_an_end_was_killed_and_the_next_one_is_its_own(tmp_path: Path) -> None:
    lines = [
        a_start(1.0),
        a_start(2.0, epoch=4),
        {"event": "end", "at": 3.0, "why": "complete", "epoch": 9, "text": ""},
    ]
    (tmp_path / STARTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_starts(tmp_path)
    assert (first.ended, first.why, first.epoch) == (None, "", None)
    assert (second.before, second.ended, second.why) == (4, 3.0, "complete")


def test_a_line_after_a_torn_one_stands_for_itself(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text(json.dumps(a_start(1.0)) + '\n{"event": "end", "at": 2')
    play(tmp_path, None, [0])
    assert [one.why for one in read_starts(tmp_path)] == ["", "complete"]


@given(st.binary(max_size=300))
def test_reading_takes_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / STARTS).write_bytes(data)
    assert read_starts(folder) == []


def test_reading_takes_a_file_cut_anywhere(tmp_path: Path) -> None:
    play(tmp_path, None, [0])
    play(tmp_path, None, [3])
    whole = (tmp_path / STARTS).read_bytes()
    all_of_them = read_starts(tmp_path)
    counts = []
    for length in range(len(whole)):
        (tmp_path / STARTS).write_bytes(whole[:length])
        found = read_starts(tmp_path)
        counts.append(len(found))
        assert [one.at for one in found] == [one.at for one in all_of_them[: len(found)]]
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2}


@pytest.mark.parametrize(
    "line", ["[]", "3", '{"event": "start"}', '{"event": "start", "at": "now"}', '{"at": 1}', "null"]
)
def test_lines_of_another_kind_are_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / STARTS).write_text(f"{line}\n{json.dumps(a_start(7.0))}\n{line}\n")
    assert [one.at for one in read_starts(tmp_path)] == [7.0]


def test_a_full_disk_is_a_warning_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dtrain.rundir.starts.os.write", full)
    with caplog.at_level(logging.WARNING):
        play(tmp_path, None, [0])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / STARTS}: a line could not be written: No space left on device"
    ] * 2


def test_nothing_of_the_environment_or_the_user_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush-hush")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    found = here(tmp_path)
    assert set(found) == {"host", "pid", "job", "versions", "cores", "code"}
    assert found["job"] == "4711"
    assert set(found["versions"]) == {"dtrain", "torch", "accelerate", "python"}
    assert found["code"] is None
    text = json.dumps({key: value for key, value in found.items() if key != "host"})
    assert "hush" not in text
    assert getpass.getuser() not in text


def test_the_commit_of_the_code(tmp_path: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)  # noqa: S607
    (tmp_path / "inner").mkdir()
    log = ["git", "log", "--format=%H"]
    told = subprocess.run(log, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert commit_of(tmp_path / "inner") == told.stdout.strip()
    assert commit_of(tmp_path / "no such folder") is None


def test_who_has_a_folder_now(tmp_path: Path) -> None:
    assert living_owner(tmp_path) is None
    with owned(tmp_path):
        owner = living_owner(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
        file = tmp_path / "owner.lock"
        told = json.loads(file.read_text())
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / file.name).write_text(json.dumps({**told, "machine": "another one"}))
        assert living_owner(elsewhere) is not None
        os.utime(elsewhere / file.name, (0, 0))
        assert living_owner(elsewhere) is None
        (elsewhere / file.name).write_text(json.dumps({**told, "started": told["started"] - 1}))
        assert living_owner(elsewhere) is None, "its number was given to another process since"
        (elsewhere / file.name).write_text("{")
        assert living_owner(elsewhere) is None
    assert living_owner(tmp_path) is None
