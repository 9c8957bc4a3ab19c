"""A try of a batch size on one rank, in a process that ends with it: a few train steps and a validation step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.config import Settings
from dtrain.data.dataloaders import with_batch_size
from dtrain.data.loader_group import LoaderGroup, batch_size_of
from dtrain.data.partition import RankBatch
from dtrain.distributed.dtensor import local_part
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import IN_TRAINING
from dtrain.engine.position import Limits, TrainPosition
from dtrain.engine.train_step import Task
from dtrain.errors import UsageError
from dtrain.launch.monitor.exit_report import write_whole
from dtrain.recipe.loader import load_recipe
from dtrain.tools.find.lr import shortened
from dtrain.tools.find.memory import Guard, is_out_of_memory, limit_device, peak_of
from dtrain.tools.find.search import BatchTrial
from dtrain.trainer.agreed import agree
from dtrain.trainer.setup import configured_engine, load_bound

FACTS, RESULT = "facts.json", "result.json"
STEPS = 3  # optimizer steps: before the second one there are no optimizer states yet; the first one is not timed
_KEY = "batch_size"


def try_batch(settings: Settings, world: World, batch: int, out: Path, limit: int | None) -> None:
    """Tries a batch size; what comes of it is in files.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        batch: samples of each rank; 0 for the recipe's own.
        out: folder of the files: rank 0 writes what there is (`facts.json`) and what it came to (`result.json`), a
            rank that runs out of memory `rank-R.json`.
        limit: bytes that each rank may take: of the GPU's memory, where it computes on one, else of the machine's.

    Raises:
        UsageError: the recipe's batch size is not known, or cannot be changed.
        torch.OutOfMemoryError: it does not fit, as whatever else says so; the rank has left word of it.
    """
    given = limit
    if world.device.type == "cuda":
        limit = limit_device(world.device, limit)
    elif limit is not None:
        Guard(limit, lambda taken: _leave_word(out, world, f"took {taken >> 20} of {(limit or 0) >> 20} MiB", taken))
    try:
        # The batch is set before anything is built: a builder may fetch one.
        task, own = agree(world, lambda: _task(settings, batch, world.size))
        if world.is_main:
            _write(out / FACTS, {**own, "limit": limit, "given": given is not None, "device": str(world.device)})
        tried = _measured(task, world, settings, own["batch"])
    except BaseException as error:
        if is_out_of_memory(error):
            _leave_word(out, world, str(error).partition("\n")[0], peak_of(world.device))
        raise
    if world.is_main:
        _write(out / RESULT, asdict(tried))


def _leave_word(out: Path, world: World, why: str, peak: int) -> None:
    _write(out / f"rank-{world.rank}.json", {"why": why, "peak": peak})


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content))


def _task(settings: Settings, batch: int, ranks: int) -> tuple[Task, dict[str, Any]]:
    """Returns the task with a batch size, and what there is: batch, key, the most samples per rank can have at once."""
    times = ranks if settings.config.train.batch == "global" else 1
    recipe = load_recipe(settings.config.recipe, settings.base)
    settings.place(recipe.parameters())
    takes = _KEY in recipe.parameters().get("data", ())
    if batch and takes:
        settings.config.data[_KEY] = batch * times
    _, task = load_bound(settings)
    loader = task.dl_train
    if isinstance(loader, LoaderGroup):
        raise UsageError(
            f"{recipe.path}: there are {len(loader.loaders)} training loaders ({', '.join(loader.loaders)}), and a "
            "search for the batch size needs one. Let build_dataloaders return one of them for it."
        )
    if batch and not takes:
        task.dl_train = loader = with_batch_size(loader, batch * times)
    size = batch_size_of(loader)
    if size is None:
        raise UsageError(
            f"{recipe.path}: the training loader ({type(loader).__name__}) has no batch size that can be "
            f"changed. Give build_dataloaders a parameter {_KEY}, and pass it to the DataLoader."
        )
    if batch and size != batch * times:
        raise UsageError(
            f"{recipe.path}: build_dataloaders({_KEY}={batch * times}) returned a training loader with batches of "
            f"{size}. Pass its {_KEY} to the DataLoader."
        )
    if not takes:
        with_batch_size(loader, size)  # or it says why that cannot be
    own = {"batch": max(1, size // times), "times": times, "key": f"data.{_KEY}" if takes else None}
    return task, {**own, "most": _samples(loader, ranks)}


def _samples(loader: Any, ranks: int) -> int | None:
    try:
        return max(1, len(loader.dataset) // ranks)
    except (TypeError, AttributeError):
        return None


def _measured(task: Task, world: World, settings: Settings, batch: int) -> BatchTrial:
    train = settings.config.train
    # A second micro-batch meets the gradients of the first; more of them take no more memory.
    short = shortened(settings, max_steps=STEPS, accumulation=min(2, train.accumulation), ema_decay=train.ema_decay)
    limits = Limits(valid=world.size if train.batch == "per_rank" else 1)
    how: dict[str, Any] = {"limits": limits, "nan": "ignore", "epoch_steps": None}
    engine = configured_engine(task, world, short, hooks=IN_TRAINING, epochs=STEPS, **how)
    clock = StepClock(engine.world)
    engine.callbacks.add(clock)
    engine.fit()
    module = task.module
    told = world.gather_json(peak_of(world.device))
    return BatchTrial(
        batch,
        True,
        peak=max(told),
        samples_per_second=clock.rate(),
        parameters=_bytes([*module.parameters(), *module.buffers()]),
        gradients=_bytes([p.grad if p.grad is not None else p for p in module.parameters() if p.requires_grad]),
        optimizer=_bytes(_tensors([optimizer.state for optimizer in engine.learner.optimizers()])),
    )


class StepClock(EngineCallback):
    """Times a run's optimizer steps, the fetching of their batches aside; the first one is left out.

    Args:
        world: the ranks.
    """

    order = Order.RECORDS

    def __init__(self, world: World) -> None:
        self.seconds = 0.0
        self.samples = 0
        self._world = world
        self._began: float | None = None
        self._taken = 0

    def rate(self) -> float | None:
        """Returns the samples a second of all ranks; None where there was but one step."""
        return self.samples / self.seconds if self.seconds else None

    def on_batch_start(self, batch: RankBatch) -> None:
        """A micro-batch begins; the first one of a group begins an optimizer step."""
        if self._began is None:
            self._began = time.perf_counter()
        self._taken += batch.total

    def on_save_point(self, position: TrainPosition) -> None:
        """An optimizer step is done."""
        if position.split != "train" or self._began is None:
            return
        if self._world.device.type != "cpu":
            torch.accelerator.synchronize()
        if position.updates > 1:
            self.seconds += time.perf_counter() - self._began
            self.samples += self._taken
        self._began, self._taken = None, 0


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


def _bytes(tensors: Any) -> int:
    """Returns what this rank holds of tensors, each counted once; rank 0's parts of sharded ones are the largest."""
    known = {id(tensor): local_part(tensor) for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in known.values())
