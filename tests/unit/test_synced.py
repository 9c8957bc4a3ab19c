"""What is said to be written is on the disk: each row of a history, and each file that is written whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.checkpoint.folder import MANIFEST, write_checkpoint
from dtrain.files import write_below
from dtrain.rundir.history import History
from dtrain.rundir.starts import noted


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The name and size of each file as it was synced."""
    found: list[tuple[str, int]] = []
    real = os.fsync

    def noting(descriptor: int) -> None:
        real(descriptor)
        found.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", noting)
    return found


def test_a_row_is_on_the_disk_when_append_returns(
    tmp_path: Path, synced: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.rundir.history._SYNC_SECONDS", 0.0)
    path = tmp_path / "history.csv"
    history = History(path)
    for epoch in (1, 2, 3):
        history.append({"epoch": epoch, "loss": 1 / epoch})
        assert synced[-1] == ("history.csv", path.stat().st_size)


def test_rows_of_short_epochs_are_on_the_disk_once_that_is_asked_for(
    tmp_path: Path, synced: list[tuple[str, int]]
) -> None:
    path = tmp_path / "history.csv"
    history = History(path)
    for epoch in (1, 2, 3):
        history.append({"epoch": epoch})
    history.sync()
    assert synced[-1] == ("history.csv", path.stat().st_size)


def test_starts_and_ends_are_on_the_disk(tmp_path: Path, synced: list[tuple[str, int]]) -> None:
    with noted(tmp_path, {}, lambda: 0):
        assert synced[-1] == ("starts.jsonl", (tmp_path / "starts.jsonl").stat().st_size)
    assert synced[-1] == ("starts.jsonl", (tmp_path / "starts.jsonl").stat().st_size)


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, synced: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a, **k: (order.append(f"{len(synced)} synced"), replace(*a, **k))[1])
    write_below(tmp_path, "config.yaml", "a: 1\n", sync=True)
    assert order == ["1 synced"]
    assert synced[0][1] == len("a: 1\n")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, synced: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[set[str]] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *a, **k: (before.append({name for name, _ in synced}), rename(*a, **k))[1])
    path = write_checkpoint(tmp_path / "checkpoints", "epoch-1", {"a.bin": [b"1"], "b.bin": [b"22"]}, {"epoch": 1})
    assert before[-1] >= {"a.bin", "b.bin", MANIFEST, f".{path.name}.part"}
    assert synced[-1][0] == "checkpoints"
