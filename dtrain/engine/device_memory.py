"""A column of the history: the most memory that torch's tensors took of a GPU in each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.rundir.columns import MEMORY

_MIB = 1 << 20


@dataclass(frozen=True)
class Peak:
    """How a device's peak is read.

    Attributes:
        reset: has it begin anew.
        read: returns the bytes since then.
    """

    reset: Callable[[], None]
    read: Callable[[], int]


class PeakMemory(EngineCallback):
    """Adds the column, in MiB: training and validation of the epoch, the largest of all ranks.

    Args:
        world: the ranks; they compare theirs once an epoch.
        peak: of the rank's device.
    """

    order = Order.RECORDS

    def __init__(self, world: World, peak: Peak) -> None:
        self._world, self._peak = world, peak

    def on_epoch_start(self, epoch: int) -> None:
        """An epoch begins."""
        self._peak.reset()

    def on_epoch_row(self, row: Mapping[str, Any]) -> Mapping[str, float]:
        """Returns the column."""
        return {MEMORY: max(self._world.gather_json(self._peak.read())) / _MIB}


def peak_memory(world: World) -> PeakMemory | None:
    """Returns what adds the column; None where the rank computes on no CUDA device."""
    device = world.device
    if device.type != "cuda":
        return None
    reset = lambda: torch.cuda.reset_peak_memory_stats(device)  # noqa: E731
    return PeakMemory(world, Peak(reset, lambda: torch.cuda.max_memory_allocated(device)))
