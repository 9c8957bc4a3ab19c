"""A few steps of a run, saved often, recorded, and on demand killed in the midst of them."""

from __future__ import annotations

import json
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.bounds import Limits
from dtrain.building import configured_engine, load_task
from dtrain.checkpoint.tree import flatten
from dtrain.config import Settings
from dtrain.config.schema import CheckpointConfig
from dtrain.dealing import Share
from dtrain.engine import Engine
from dtrain.fingerprints import tensor_bytes
from dtrain.fsdp.tensors import local_part
from dtrain.metrics import Mean, Observed, Value
from dtrain.passes import Place
from dtrain.resuming.fitting import facts_of
from dtrain.resuming.keeper import Keeper
from dtrain.run import agree, begin
from dtrain.run_folder import CHECKPOINTS
from dtrain.world import World

EPOCHS = 2
# Every second step, so that a kill mostly takes something that must be done again; on the disk before the next step.
_POLICY = CheckpointConfig(every_steps=2, asynchronous=False)


class Recorder:
    """One rank's steps, a line each, on the disk before the next step begins.

    Args:
        path: the file; lines are added.
        engine: what is followed.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._engine = engine
        self._shares: list[dict[str, Any]] = []
        self._learn = engine.learner.learn
        engine.learner.learn = self._followed  # type: ignore[method-assign]

    def note(self, place: Place) -> None:
        """Writes what an optimizer step took and left."""
        engine = self._engine
        line = {
            "epoch": place.epoch,
            "end": place.split != "train",
            "updates": place.updates,
            "shares": self._shares,
            "weights": _sums(engine.task.module.state_dict()),
            "optimizer": _sums(_tensors([optimizer.state_dict() for optimizer in engine.learner.optimizers()])),
            "lr": [group["lr"] for o in engine.learner.optimizers() for group in o.param_groups],
            "row": engine.history.rows[-1] if place.split != "train" else None,
        }
        self._file.write(json.dumps(line, default=float) + "\n")
        self._shares = []

    def close(self) -> None:
        """Ends the record."""
        self._file.close()

    def _followed(self, share: Share) -> dict[str, Value]:
        rows = [zlib.crc32(tensor_bytes(part)) for part in _tensors(share.batch).values()]
        values = self._learn(share)
        indices = None if share.indices is None else repr(share.indices)
        self._shares.append({"rows": rows, "indices": indices, "values": {n: _number(v) for n, v in values.items()}})
        return values


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
    limits = Limits(train=batches, valid=batches)
    engine = configured_engine(task, world, settings, epochs=EPOCHS, limits=limits)
    folder, *_ = begin(engine, settings, "auto", lambda _: None)  # nobody else knows of this folder
    keeper = Keeper(engine, folder / CHECKPOINTS, _POLICY, lambda: facts_of(engine, settings))
    recorder = Recorder(record / f"rank-{world.rank}.jsonl", engine)
    engine.after_step.append(recorder.note)
    keeper.attach()

    def kill(place: Place) -> None:
        if 0 < kill_at <= place.updates and place.split == "train":
            os.kill(os.getpid(), signal.SIGKILL)

    engine.after_step.append(kill)
    engine.fit()
    keeper.close()
    recorder.close()
