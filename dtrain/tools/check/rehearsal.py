"""A few steps of a run, saved often, recorded, and on demand killed in the midst of them."""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint.compat import facts_of
from dtrain.checkpoint.saver import Checkpointer
from dtrain.checkpoint.tree import flatten
from dtrain.config import Settings
from dtrain.config.schema import CheckpointConfig
from dtrain.data.fingerprints import tensor_bytes
from dtrain.data.partition import RankBatch
from dtrain.distributed.dtensor import local_part
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import Mean, Observed, Value
from dtrain.engine.position import Limits, TrainPosition
from dtrain.layout import CHECKPOINTS
from dtrain.recipe.supplied import epoch_length
from dtrain.trainer.agreed import agree
from dtrain.trainer.begin import begin
from dtrain.trainer.setup import configured_engine, load_task

EPOCHS = 2
# Every second step, so that a kill mostly takes something that must be done again; on the disk before the next step.
_POLICY = CheckpointConfig(every_steps=2, asynchronous=False)


class Recorder(EngineCallback):
    """One rank's steps, a line each, on the disk before the next step begins.

    Args:
        path: the file; lines are added.
        engine: what is followed.
    """

    order = Order.RECORDS

    def __init__(self, path: Path, engine: Engine) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._engine = engine
        self._rows: list[int] = []  # checksums of the batch's tensors, as they were before the step
        self._shares: list[dict[str, Any]] = []

    def on_save_point(self, position: TrainPosition) -> None:
        """Writes what an optimizer step took and left."""
        engine = self._engine
        line = {
            "epoch": position.epoch,
            "end": position.split != "train",
            "updates": position.updates,
            "shares": self._shares,
            "weights": _sums(engine.task.module.state_dict()),
            "optimizer": _sums(_tensors([optimizer.state_dict() for optimizer in engine.learner.optimizers()])),
            "lr": [group["lr"] for o in engine.learner.optimizers() for group in o.param_groups],
            "row": engine.history.rows[-1] if position.split != "train" else None,
        }
        self._file.write(json.dumps(line, default=float) + "\n")
        self._shares = []

    def close(self) -> None:
        """Ends the record."""
        self._file.close()

    def on_batch_start(self, batch: RankBatch) -> None:
        """Takes the batch as it is before the step, which may change it."""
        parts = _tensors(batch.batch).values() if batch.count else ()  # what only keeps a rank in step may be any batch
        self._rows = [zlib.crc32(tensor_bytes(part)) for part in parts]

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """Notes what a train step was given and returned."""
        indices = None if batch.indices is None else repr(batch.indices)
        numbers = {name: _number(value) for name, value in values.items()} if batch.count else {}
        self._shares.append({"rows": self._rows, "indices": indices, "values": numbers})


class Kill(EngineCallback):
    """Ends this rank by SIGKILL once so many optimizer steps are taken and saved, where they are to be.

    Args:
        at: the optimizer steps; 0 for never.
    """

    order = Order.LAST

    def __init__(self, at: int) -> None:
        self._at = at

    def on_save_point(self, position: TrainPosition) -> None:
        """An optimizer step is done, and saved where it is due."""
        if 0 < self._at <= position.updates and position.split == "train":
            os.kill(os.getpid(), signal.SIGKILL)


def _sums(values: dict[str, Any]) -> dict[str, int]:
    return {name: _sum(name, value) for name, value in values.items()}


def _sum(name: str, value: Any) -> int:
    """A checksum of a tensor, or of any other state that a checkpoint can hold."""
    if isinstance(value, Tensor):
        return zlib.crc32(tensor_bytes(local_part(value)))
    structure, tensors = flatten(value, name)
    return zlib.crc32(json.dumps([structure, list(_sums(dict(tensors)).values())]).encode())


def _tensors(tree: Any, where: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {where: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: tensor for key, part in pairs for name, tensor in _tensors(part, f"{where}/{key}").items()}


def _number(value: Value) -> float | None:
    if isinstance(value, Observed):
        return None
    value = value.total if isinstance(value, Mean) else value
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def rehearse(settings: Settings, world: World, record: Path, *, steps: int, kill_at: int) -> None:
    """Trains two short epochs, from where the run in the config's folder is.

    Args:
        settings: the recipe and its parameters; `run.name` is set.
        world: the ranks.
        record: folder of the ranks' records.
        steps: optimizer steps of an epoch.
        kill_at: all ranks end by SIGKILL after so many optimizer steps; 0 for never.
    """
    task = agree(world, lambda: load_task(settings))
    train = settings.config.train
    batches = steps * train.accumulation * (world.size if train.batch == "per_rank" else 1)
    length = epoch_length(task.dl_train, world.size, settings, by_rank=task.batches.by_rank)
    if length is None:
        limits = Limits(train=batches, valid=batches)
    else:  # epochs that go on with the data, as in the run itself
        length, limits = min(steps, length), Limits(valid=batches)
    engine = configured_engine(task, world, settings, epochs=EPOCHS, limits=limits, epoch_steps=length)
    folder, *_ = begin(engine, settings, "auto", lambda _: None)  # nobody else knows of this folder
    config = settings.plain()
    keeper = Checkpointer(engine, folder / CHECKPOINTS, _POLICY, lambda: facts_of(engine, config, folder))
    engine.callbacks.add(Recorder(record / f"rank-{world.rank}.jsonl", engine), Kill(kill_at))
    keeper.attach()
    engine.fit()
