"""The 2-norms of each parameter's gradient and weight, every so many optimizer steps, in a run's `norms.csv`.

They are taken right before an optimizer steps, whoever calls its `step()`, and before the gradients are clipped. By
then these are those of the whole global batch: averaged over the ranks, summed over accumulated batches. Between such
steps nothing is done but to count; at one, the device is waited for once, by rank 0.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.position import TrainPosition
from dtrain.files import append_whole, open_below
from dtrain.layout import NORMS

COLUMNS = ("epoch", "step", "name", "weight_norm", "grad_norm")
_SYNC_SECONDS = 1.0  # as the history

Tell = Callable[[Mapping[str, float]], None]


class Norms(EngineCallback):
    """Follows an engine's optimizer steps; every rank has one.

    Args:
        engine: it has not trained yet, but is where it goes on from.
        every: optimizer steps from one row of each parameter to the next; those are counted since the run began.
        folder: the run's.
        tell: is told of each step's norms by name, on rank 0; None for nobody.

    Raises:
        OSError: the file cannot be written.
    """

    order = Order.RECORDS

    def __init__(self, engine: Engine, every: int, folder: Path, tell: Tell | None = None) -> None:
        self._engine = engine
        self._every = every
        self._tell = tell
        self._file = NormsFile(folder / NORMS, engine.place.updates) if engine.world.is_main else None
        self._grads: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        # Before the clipping, which is hooked in at the first train step.
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Looks away; what was written is on the disk."""
        self._handle.remove()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._engine.learner.steps.before(optimizer)  # a step within the same train step counts from now on
        if (self._engine.place.updates + 1) % self._every:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._engine.task.module.named_parameters():
            if not parameter.requires_grad or id(parameter) not in held or name in self._weights:
                continue
            self._weights[name] = self._norm(parameter)
            if parameter.grad is not None:
                self._grads[name] = self._norm(parameter.grad)

    def on_step_end(self, position: TrainPosition) -> None:
        """Writes the norms of an optimizer step, where it is one of those."""
        if position.split != "train" or not position.passed(self._every):
            return
        step = position.updates - position.updates % self._every
        for name, parameter in self._engine.task.module.named_parameters():
            if parameter.requires_grad and name not in self._weights:
                self._weights[name] = self._norm(parameter)  # no optimizer stepped it, and so it is as it was
        weights, grads = self._weights, self._grads
        self._weights, self._grads = {}, {}
        if self._file is None or not weights:
            return
        numbers = torch.stack([*weights.values(), *grads.values()]).tolist()  # the one wait
        weight_of = dict(zip(weights, numbers, strict=False))
        grad_of = dict(zip(grads, numbers[len(weights) :], strict=True))
        self._file.add([(position.epoch, step, name, weight_of[name], grad_of.get(name, "")) for name in weights])
        if self._tell is not None:
            self._tell(
                {f"norm/weight/{name}": norm for name, norm in weight_of.items()}
                | {f"norm/grad/{name}": norm for name, norm in grad_of.items()}
            )

    def _norm(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_sparse:
            tensor = tensor.coalesce().values()
        norm = torch.linalg.vector_norm(tensor, dtype=None if tensor.is_complex() else self._engine.world.sum_dtype)
        # Of a parameter that the ranks have parts of (a DTensor) all of them must take part in the sum.
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole.to(self._engine.world.sum_dtype)


class NormsFile:
    """A run's `norms.csv`. Each step's rows are one write, so that a kill leaves whole steps.

    Args:
        path: the file. One that is there is gone on with: what it has of later steps, which are computed again, goes.
        updates: optimizer steps of the run so far.
    """

    def __init__(self, path: Path, updates: int) -> None:
        self._path = path
        end = _end_of(path, updates) if os.path.lexists(path) else 0
        self._descriptor = open_below(path.parent, path.name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.ftruncate(self._descriptor, end)
        self._synced = float("-inf")
        if end == 0:
            self._write([COLUMNS], sync=False)

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        """Appends a step's rows, and syncs the file where it last did so a second ago.

        Raises:
            OSError: they could not be written.
        """
        now = time.monotonic()
        due = now - self._synced >= _SYNC_SECONDS
        self._write(rows, sync=due)
        self._synced = now if due else self._synced

    def close(self) -> None:
        """Returns once all is on the disk."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _write(self, rows: list[tuple[Any, ...]], *, sync: bool) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(rows)
        try:
            append_whole(self._descriptor, buffer.getvalue().encode(), self._path, sync=sync)
        except OSError as error:
            raise OSError(error.errno, f"{NORMS}: {error.strerror}") from None


def _end_of(path: Path, updates: int) -> int:
    """Returns the length of the part of a file that holds its head and the whole rows of the first `updates` steps."""
    end = 0
    with os.fdopen(open_below(path.parent, path.name, os.O_RDONLY), "rb") as file:
        for number, line in enumerate(file):
            cells = line.split(b",", 2)
            torn = not line.endswith(b"\n") or len(cells) < 3
            if torn or (number > 0 and not (cells[1].isdigit() and int(cells[1]) <= updates)):
                break
            end += len(line)
    return end
