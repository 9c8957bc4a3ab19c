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

from dtrain.launch.left import remove_left, reports_folder
from dtrain.launch.owner import Owner

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
    with reports_folder() as name:
        assert not gone.exists() and not again.exists()
        remove_left(tmp_path)
        assert Path(name).is_dir(), "that of a process that lives"
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
