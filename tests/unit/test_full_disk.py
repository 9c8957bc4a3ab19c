"""What is told where a disk is full: what ended the run, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dtrain.callbacks.param_norms import NormsFile
from dtrain.distributed.world import bring_up
from dtrain.engine.position import TrainPosition
from dtrain.errors import notes_of
from dtrain.launch.monitor.exit_report import part_of, write_whole
from dtrain.trainer.ending import report_exception


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("dtrain.callbacks.param_norms.os.write", refuse)


@pytest.mark.usefixtures("full")
def test_what_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "it.json", "{}")
    assert not part_of(tmp_path / "it.json").exists()


@pytest.mark.usefixtures("full")
def test_an_error_is_not_hidden_by_that_of_its_report(tmp_path: Path) -> None:
    error = ValueError("the user's own")
    report_exception(tmp_path, TrainPosition(0, 1, "train", 2), bring_up(cpu=True), error)
    assert any("failure.json could not be written: No space left on device" in note for note in notes_of(error))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full")
def test_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"norms\.csv: No space left on device"):
        NormsFile(tmp_path / "norms.csv", 0)
