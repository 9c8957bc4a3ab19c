"""How ranks agree, in one small collective, on what there is to average and on who is done with a train step."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.world import World

PASS = 0
DONE = 1
_PATIENCE_SECONDS = 30.0


@dataclass
class Told:
    """What all ranks told each other.

    Attributes:
        dense: numbers of the parameters with a gradient to be averaged on some rank.
        sparse: of those with sparse gradients alone.
        more: whether some rank has not ended its train step.
        unequal: whether some have, and cannot wait for the others.
        misfit: whether some rank's step is none that DDP is right for.
        all_idle: whether no rank got a gradient.
    """

    dense: list[int] = field(default_factory=list)
    sparse: list[int] = field(default_factory=list)
    more: bool = False
    unequal: bool = False
    misfit: bool = False
    all_idle: bool = True


class Meeting:
    """Has all ranks tell each other where they are, in a collective of two bytes a parameter.

    Args:
        world: several ranks.
        count: of the parameters, the same on all ranks.

    Attributes:
        last: what was told the last time.
    """

    def __init__(self, world: World, count: int) -> None:
        self._world = world
        self._count = count
        self.last = Told()

    def hold(self, kind: int, marks: tuple[list[int], list[int]], *, strict: bool, misfit: bool, idle: bool) -> Told:
        """Meets the other ranks, wherever each is in its train step.

        Args:
            kind: PASS after a backward pass, DONE at the end of the train step.
            marks: numbers of the parameters with dense and with sparse gradients that are to be averaged.
            strict: whether this rank, being done, cannot wait for the others' backward passes.
            misfit: whether DDP would not be right for its step.
            idle: whether it got no gradient in the step.
        """
        flags = bytes([kind == PASS, kind == DONE and strict, misfit, idle, not idle])
        packed = bytearray(2 * self._count + len(flags))
        packed[2 * self._count :] = flags
        for part, numbers in enumerate(marks):
            for number in numbers:
                packed[part * self._count + number] = 1
        moved = torch.frombuffer(packed, dtype=torch.uint8).to(self._world.device)
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        self.last = self._read(bytes(moved.tolist()))
        return self.last

    def _read(self, told: bytes) -> Told:
        dense, sparse = told[: self._count], told[self._count : 2 * self._count]
        more, strict, misfit, idle, busy = map(bool, told[2 * self._count :])
        return Told(
            dense=[number for number, mark in enumerate(dense) if mark],
            sparse=[number for number, mark in enumerate(sparse) if mark and not dense[number]],
            more=more,
            unequal=more and strict,
            misfit=misfit or (idle and busy),
            all_idle=not busy,
        )


def wait_for_all(world: World, number: tuple[int, int], what: str) -> list[int]:
    """Waits until all ranks have come to the same, past any collective that some of them may be in.

    Args:
        world: several ranks.
        number: of who waits in this process, and how many times that was before, by which the ranks find each other.
        what: where this rank is; only ranks that say the same meet.

    Returns:
        the ranks that did not come.
    """
    store = _get_default_store()
    key = f"dtrain/waits/{number[0]}/{number[1]}/{zlib.crc32(what.encode())}/"
    store.set(f"{key}{world.rank}", "here")
    missing, end = [], time.monotonic() + _PATIENCE_SECONDS
    for rank in range(world.size):
        left = max(0.001, end - time.monotonic())
        try:
            store.wait([f"{key}{rank}"], timedelta(seconds=left))
        except (RuntimeError, ValueError):  # as torch says that the time is over
            missing.append(rank)
    return missing
