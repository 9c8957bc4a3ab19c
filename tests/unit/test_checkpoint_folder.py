"""Checkpoints under kills, full disks and damage: there is always a good one, and a bad one is never taken for good."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.checkpoint.folder import all_saved, remove_leftovers, set_aside, verify, write_checkpoint
from dtrain.checkpoint.locate import FILES, find_good, read
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.checkpoint.saver import Checkpointer
from dtrain.checkpoint.tensors import pieces
from dtrain.checkpoint.weights import WEIGHTS
from dtrain.checkpoint.writer import Snapshot, Writer
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.world import bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.errors import CheckpointError, UsageError
from dtrain.launch.env.memory import Memory
from dtrain.layout import checkpoint_name, checkpoints_in

# What a save and the pruning after it ask of the system.
CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir", "close")


def files_of(number: int) -> dict[str, Any]:
    tensors = {"weight": torch.full((50,), float(number)), "bias": torch.arange(3)}
    return {name: [b'{"list": []}'] if name.endswith(".json") else pieces(tensors) for name in FILES}


def save(folder: Path, epoch: int, step: int | None = None, **values: float) -> Path:
    row = None if step is not None else {"epoch": epoch, **values}
    facts = {"format": 1, "row": row, "ranks": 1}
    path = write_checkpoint(folder, checkpoint_name(epoch, step), files_of(epoch), facts)
    RetentionPolicy(last=1, best=0).prune(folder)
    return path


def dies_at(number: int, action: Callable[[], object]) -> bool:
    """Whether a child that runs the action was killed at its so-and-so-many-th system call, half of a write done."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def counted(*arguments: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    if name == "write":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **more)

            return counted

        try:
            for name in CALLS:
                setattr(os, name, deadly(getattr(os, name), name))
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_each_system_call_of_a_save(tmp_path: Path) -> None:
    folder, number = tmp_path / "checkpoints", 0
    killed = True
    while killed:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, loss=1.0)
        killed = dies_at(number, lambda: save(folder, 2, loss=0.5))
        found = find_good(folder)
        assert found is not None, f"no valid checkpoint after a kill at call {number}"
        assert found.words == (), f"something bad has a checkpoint's name after a kill at call {number}"
        assert verify(found.saved.path)["row"]["epoch"] == found.saved.epoch
        assert found.saved.epoch == 2 or (folder / "epoch-1").exists()
        remove_leftovers(folder)
        if found.saved.epoch == 1:
            save(folder, 2, loss=0.5)
        RetentionPolicy(last=1, best=0).prune(folder)
        assert [path.name for path in folder.iterdir()] == ["epoch-2"], f"left after a kill at call {number}"
    assert number > 40, "the calls of a save were counted"


def test_killed_while_leftovers_are_removed(tmp_path: Path) -> None:
    folder, number, killed = tmp_path / "checkpoints", 0, True
    while killed:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, loss=1.0)
        for name in (".epoch-2.part", ".epoch-0.gone"):
            shutil.copytree(folder / "epoch-1", folder / name)
        killed = dies_at(number, lambda: remove_leftovers(folder))
        remove_leftovers(folder)
        assert [path.name for path in folder.iterdir()] == ["epoch-1"]
        assert find_good(folder) is not None
    assert number > 10


# --- damage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    for epoch in (1, 2):
        facts = {"format": 1, "row": {"epoch": epoch, "loss": 1.0}, "config": {"train": {"seed": 1}}}
        write_checkpoint(folder, checkpoint_name(epoch, None), files_of(epoch), facts)
    return folder


FILE = st.sampled_from(["manifest.json", *FILES])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(name=FILE, place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_any_byte_flipped_is_found_and_the_one_before_is_taken(two: Path, name: str, place: float, change: int) -> None:
    file = two / "epoch-2" / name
    data = bytearray(file.read_bytes())
    whole = bytes(data)
    data[int(place * len(data))] ^= change
    file.write_bytes(data)
    try:
        check_fallback(two, name)
    finally:
        file.write_bytes(whole)


def test_every_byte_of_the_manifest_counts(two: Path) -> None:
    file = two / "epoch-2" / "manifest.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        for change in (0x01, 0x20):
            data = bytearray(whole)
            data[place] ^= change
            file.write_bytes(data)
            with pytest.raises(CheckpointError):
                verify(two / "epoch-2")
    file.write_bytes(whole)
    verify(two / "epoch-2")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(name=FILE, part=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=3))
def test_any_file_truncated_or_with_more_is_found(two: Path, name: str, part: float, more: bytes) -> None:
    file = two / "epoch-2" / name
    whole = file.read_bytes()
    file.write_bytes(whole + more if more else whole[: int(part * len(whole))])
    try:
        check_fallback(two, name)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
def test_any_file_missing_is_found(two: Path, name: str) -> None:
    file = two / "epoch-2" / name
    whole = file.read_bytes()
    file.unlink()
    try:
        check_fallback(two, name)
    finally:
        file.write_bytes(whole)


def check_fallback(folder: Path, name: str) -> None:
    found = find_good(folder)
    assert found is not None
    assert found.saved.path.name == "epoch-1"
    assert found.newer == (folder / "epoch-2",)
    assert str(folder / "epoch-2" / name) in found.words[0]


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    for epoch in (1, 2):
        write_checkpoint(tmp_path, checkpoint_name(epoch, None), files_of(epoch), {"format": 1})
        (tmp_path / f"epoch-{epoch}" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no valid checkpoint.*epoch-2/model.*epoch-1/model"):
        find_good(tmp_path)
    assert len(checkpoints_in(tmp_path)) == 2, "left unchanged"
    assert find_good(tmp_path / "nothing") is None


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "epoch-1", {WEIGHTS: pieces({"a": torch.ones(1)})}, {"row": {"epoch": 1}})
    with pytest.raises(CheckpointError, match="no state to resume from"):
        find_good(tmp_path)


def test_pickles_in_every_file_run_nothing(tmp_path: Path) -> None:
    """Also where somebody made the manifest to match them."""
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(witness),)

    bomb = pickle.dumps(Evil())
    assert pickle.loads(bomb) is None and witness.is_dir(), "it would run"  # noqa: S301
    witness.rmdir()
    folder = tmp_path / "checkpoints"
    path = write_checkpoint(folder, "epoch-1", {name: [bomb] for name in FILES}, {"format": 1})
    found = find_good(folder)
    assert found is not None
    with pytest.raises(CheckpointError):
        read(found.saved.path).loaded()
    for name in ("manifest.json", *FILES):
        (path / name).write_bytes(bomb)
    with pytest.raises(CheckpointError):
        find_good(folder)
    assert not witness.exists()


# --- what is kept -------------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept_by_the_monitor(tmp_path: Path) -> None:
    rows = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.1, 5: float("nan")}
    for epoch, accuracy in rows.items():
        for step in (None, 7):
            row = {"epoch": epoch, "val_acc": accuracy} if step is None else None
            write_checkpoint(tmp_path, checkpoint_name(epoch, step), {}, {"row": row})
    RetentionPolicy(last=3, best=2, monitor="val_acc", mode="max").prune(tmp_path)
    assert [one.path.name for one in all_saved(tmp_path)] == [
        "epoch-2",
        "epoch-3",
        "epoch-4",
        "epoch-5-step-7",
        "epoch-5",
    ]
    RetentionPolicy(last=1, best=0).prune(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-5"]


def test_the_last_epochs_end_is_kept_among_many_steps(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint_name(1, None), {}, {"row": {"epoch": 1, "loss": 1.0}})
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, checkpoint_name(2, step), {}, {"row": None})
    RetentionPolicy(last=1, best=0).prune(tmp_path)
    assert [one.path.name for one in all_saved(tmp_path)] == ["epoch-1", "epoch-2-step-3"]


def test_a_damaged_one_is_never_pruned(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        write_checkpoint(tmp_path, checkpoint_name(epoch, None), {}, {"row": {"epoch": epoch, "loss": 1.0}})
    (tmp_path / "epoch-2" / "manifest.json").write_text("{}")
    RetentionPolicy(last=1, best=0).prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-2", "epoch-3"]
    aside = [set_aside(tmp_path / "epoch-2").name]
    shutil.copytree(tmp_path / "epoch-3", tmp_path / "epoch-2")
    aside.append(set_aside(tmp_path / "epoch-2").name)
    assert aside == [".epoch-2.damaged-1", ".epoch-2.damaged-2"]
    remove_leftovers(tmp_path)
    assert all((tmp_path / name).is_dir() for name in aside)


def test_an_unknown_monitor_is_told_with_the_columns() -> None:
    with pytest.raises(UsageError, match=r"checkpoint\.monitor = 'val_los'.*Did you mean 'val_loss'"):
        RetentionPolicy(monitor="val_los").check({"epoch": 1, "loss": 1.0, "val_loss": 2.0})


def test_one_of_this_name_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 1, loss=1.0)
    before = json.loads((tmp_path / "epoch-1" / "manifest.json").read_text())
    with pytest.raises(CheckpointError, match="already exists"):
        save(tmp_path, 1, loss=2.0)
    assert json.loads((tmp_path / "epoch-1" / "manifest.json").read_text()) == before


# --- written beside the training ------------------------------------------------------------------------


def test_a_snapshot_is_a_copy_and_uses_its_memory_again() -> None:
    snapshot, tensors = Snapshot(), {"a": torch.ones(4, 3).t(), "b": torch.tensor(2)}
    first = snapshot.take(tensors)
    tensors["a"].fill_(7)
    assert first["a"].tolist() == torch.ones(3, 4).tolist() and first["a"].is_contiguous()
    address = first["a"].data_ptr()
    second = snapshot.take(tensors)
    assert second["a"].data_ptr() == address and float(second["a"].sum()) == 84.0
    assert snapshot.take({"a": torch.ones(2)})["a"].shape == (2,)


def test_a_later_checkpoint_needs_no_more_memory_than_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy's memory is there from then on, and missing from what is free."""
    net = nn.Linear(100, 1000)
    size = 4 * (100 + 1) * 1000
    copies: list[bool] = []
    take = Snapshot.take
    monkeypatch.setattr(Snapshot, "take", lambda *given: copies.append(True) or take(*given))
    monkeypatch.setattr(
        "dtrain.checkpoint.writer.read_memory", lambda: Memory((3 if copies else 5) * size // 2, 1 << 40)
    )
    loader = DataLoader(TensorDataset(torch.ones(2, 100)), batch_size=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    task = Task(net, lambda model, x: model(x).square().mean(), loader, optimizer=optimizer)
    engine = Engine(task, bring_up(cpu=True), epochs=3)
    keeper = Checkpointer(engine, tmp_path, CheckpointConfig(keep_last=3), dict)
    keeper.attach()
    engine.fit()
    keeper.on_train_end()
    assert len(copies) == len(all_saved(tmp_path)) == 3 and "not enough memory" not in caplog.text


def test_what_a_thread_raises_is_raised_where_the_training_is() -> None:
    writer, seen = Writer(beside=True), []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    with pytest.raises(OSError, match="No space left"):
        writer.submit(lambda: seen.append(1))
    writer.submit(lambda: seen.append(2))
    writer.wait()
    writer.wait()
    assert seen == [2], "an error is told once, and the next job runs"
