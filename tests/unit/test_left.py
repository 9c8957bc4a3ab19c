"""What a launcher that was killed left in the folder of temporary files goes with the next one; nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dtrain.launch.signals.left_behind import open_folders, own_folder, remove_left
from dtrain.launch.signals.owner import Owner
from dtrain.launch.signals.reaper import Reaper

ME = Owner.me()


def left(path: Path, owner: Owner | None) -> Path:
    path.mkdir()
    (path / "rank-0.json").write_text("{}")
    if owner is not None:
        (path / "owner.json").write_text(json.dumps(asdict(owner)))
    return path


def test_what_ended_launchers_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    gone = left(tmp_path / "dtrain-gone", replace(ME, pid=ended.pid))
    again = left(tmp_path / "dtrain-again", replace(ME, started=ME.started - 1))  # its number was given to this process
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with own_folder() as name:
        assert not gone.exists() and not again.exists()
        remove_left(tmp_path)
        assert Path(name).is_dir(), "that of a process that lives"
        assert Path(name).stat().st_mode & 0o777 == 0o700
        with own_folder("call-") as other:
            assert open_folders() == [name, other]
    assert open_folders() == []
    assert list(tmp_path.iterdir()) == []


def test_whatever_may_be_somebody_s_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(ME, started=ME.started - 1)
    kept = [
        left(tmp_path / "dtrain-mine", ME),
        left(tmp_path / "dtrain-elsewhere", replace(gone, machine="another machine, or another container")),
        left(tmp_path / "dtrain-without-times", replace(gone, started=0)),
        left(tmp_path / "dtrain-nobody-s", None),
        left(tmp_path / "other", gone),
    ]
    (tmp_path / "dtrain-torn").mkdir()
    (tmp_path / "dtrain-torn" / "owner.json").write_text('{"pid": 7}')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "dtrain-link").symlink_to(left(tmp_path / "elsewhere" / "dtrain-x", gone))
    before = sorted(tmp_path.rglob("*"))
    remove_left(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and kept
    theirs = left(tmp_path / "dtrain-theirs", gone)
    with monkeypatch.context() as another:
        another.setattr(os, "geteuid", lambda: os.getuid() + 1)
        remove_left(tmp_path)
    assert theirs.is_dir(), "another user's"
    remove_left(tmp_path)
    assert not theirs.exists()


def test_a_reaper_removes_the_folders_that_were_meant_and_follows_no_link(tmp_path: Path) -> None:
    meant, other, swapped = tmp_path / "meant", tmp_path / "other", tmp_path / "swapped"
    for folder in (meant, other, swapped):
        left(folder, None)
    (meant / "link").symlink_to(other)
    reaper = Reaper([], [str(meant), str(swapped)])
    swapped.rename(tmp_path / "moved")
    swapped.symlink_to(other)
    reaper._process.stdin.close()  # type: ignore[union-attr] - as when this process is killed
    reaper._process.wait(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "other", "swapped"]
    assert (other / "rank-0.json").exists() and (tmp_path / "moved/rank-0.json").exists()
    dismissed = Reaper([], [str(other)])
    dismissed.dismiss()
    assert other.is_dir(), "its process removes it itself"
