"""What is told where a disk is full: what ended the run, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dtrain.callbacks.param_norms import NormsFile
from dtrain.distributed.world import bring_up
from dtrain.engine.position import TrainPosition
from dtrain.errors import EXIT_HANG, notes_of
from dtrain.launch.monitor import heartbeat, postmortem
from dtrain.launch.monitor.exit_report import RankIdentity, part_of, write_whole
from dtrain.launch.monitor.hang_watch import Hang
from dtrain.launch.monitor.heartbeat import Heartbeat, own_heartbeat, read_beat
from dtrain.launch.monitor.postmortem import PostMortem, SupervisorState
from dtrain.trainer.ending import report_exception


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "pwrite", refuse)
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


@pytest.mark.usefixtures("full")
def test_a_rank_whose_beats_have_no_room_goes_on_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a mapped file that has no block on the disk ends the process by SIGBUS as it is written."""
    monkeypatch.setattr(heartbeat, "identity", lambda: RankIdentity(0, 1, tmp_path))
    assert own_heartbeat() is None


def test_beats_go_on_where_an_earlier_object_left_them(tmp_path: Path) -> None:
    for count in (1, 2):
        Heartbeat(tmp_path / "rank-0.beat").enter("train", count)
        assert (read_beat(tmp_path, 0).count, read_beat(tmp_path, 0).epoch) == (count, count)
    assert (tmp_path / "rank-0.beat").stat().st_size == 64


@pytest.mark.usefixtures("full")
def test_a_hang_is_told_where_the_stacks_have_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for name in ("named_run", "present_run"):
        monkeypatch.setattr(postmortem, name, lambda _: tmp_path / "run")
    hang = Hang(0, 9.0, {0: "waiting for 9 s"}, [], {0: "its stack"})
    outcome = PostMortem(tmp_path, range(1)).verdict(SupervisorState(hang=hang))
    assert outcome.exit_code == EXIT_HANG
    assert "a hang was stopped: rank 0 has been waiting for 9 s" in outcome.text
    assert "stacks.txt could not be written: No space left on device" in outcome.text
    assert outcome.failure is not None
    assert outcome.failure.cause == "hang"
