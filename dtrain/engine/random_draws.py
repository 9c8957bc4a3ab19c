"""The random numbers of steps, so that they are the same on any number of ranks.

Before each step torch's default generators, those that dropout draws from, are seeded from the run's seed, the epoch
and the place of the step's global batch in the loader's order. With one rank that is all. With several, the step's
random functions draw for the whole global batch, and keep this rank's rows (`dtrain.engine.random_rows`); what is
drawn outside of steps, such as augmentation in the main process, comes from the rank's own streams.

So no number depends on what was drawn before the step, and a run that is resumed, on whatever number of ranks, draws
what it would have drawn. Python's and NumPy's generators are seeded alike where an epoch's first step draws from them.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.data.partition import BatchMode, RankBatch
from dtrain.distributed.seeding import HostStreams, derive
from dtrain.distributed.world import World
from dtrain.engine.optimizer_draws import OptimizerDraws
from dtrain.engine.random_rows import check_supported, draw_for, has_drawn, shapes_of, take_apart
from dtrain.engine.row_evidence import RowEvidence, ShapeExchange
from dtrain.engine.row_rule import Part
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

_BITS = (1 << 63) - 1


class StepDraws:
    """Leads the random numbers of one split's steps.

    Args:
        world: the ranks.
        seed: the run's.
        shapes: as for `dtrain.engine.random_rows.Part`.
        weights: returns the tensors that these are of.

    Attributes:
        used: whether the steps draw from Python's or NumPy's generators; None before an epoch's first step.
        evidence: which of the numbers that they draw are rows of the batch.
    """

    def __init__(
        self,
        world: World,
        seed: int,
        shapes: frozenset[tuple[int, ...]] = frozenset(),
        weights: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.used: bool | None = None
        self.evidence = RowEvidence()
        self._meeting = ShapeExchange(world) if world.size > 1 else None
        self._looks = False
        self._seed = seed
        self._device = world.device
        none = world.device.type in ("cpu", "meta")  # of which there are no generators of their own
        self._module: Any = None if none else torch.get_device_module(world.device)
        self._several = world.size > 1
        self._shapes, self._weights = shapes, weights
        self._base = 0
        self._own: Any = None  # the states of torch's generators that are the rank's own, while a step has common ones
        self._host, self._exchanged = HostStreams(), False  # those of Python and NumPy
        self._inside = False
        self._optimizers = OptimizerDraws()
        self._silent, self._main = not world.is_main, world.is_main
        self._warned: set[str] = set()
        self._split = ""
        self._loose = False  # whether the step's batch is no stacked tensors

    def varies(self, epoch: int) -> bool:
        """Whether an epoch begins with a batch that is cut into unequal parts, to see which draws follow the rows.

        It is a matter of the epoch alone, so that a resumed run cuts as the one before did.
        """
        return self._several and epoch == 1

    def begin(self, split: str, epoch: int, skip: int = 0) -> None:
        """An epoch's pass begins, or is gone on with after so many steps."""
        if skip == 0:
            self.used = None
        self._split = split
        self._base = derive(self._seed, "random", split, epoch)

    def enter(self, rank_batch: RankBatch) -> None:
        """A step begins."""
        self._inside = True
        seed = (self._base + rank_batch.whole_start) & _BITS
        if self.used is not False:
            self._host.exchange(seed)
            self._exchanged = True
        if self._several:
            self._own = torch.default_generator.get_state(), self._module and self._module.get_rng_state()
        torch.default_generator.manual_seed(seed)
        if self._module is not None:
            self._module.manual_seed(seed)
        if self._several and rank_batch.rows < rank_batch.total:
            self._loose = not self._silent and not _is_stacked(rank_batch.batch, rank_batch.rows)
            part = Part(
                rank_batch.start - rank_batch.whole_start if rank_batch.count else 0,
                rank_batch.rows,
                rank_batch.total,
                self._shapes,
            )
            self._looks = rank_batch.varied and self._meeting is not None
            draw_for(part, self.evidence, self._meeting if self._looks else None, self._weights)
            self._optimizers.open()

    def leave(self) -> None:
        """The step is over; nothing is done where none has begun."""
        if not self._inside:
            return
        self._inside = False
        if self._several:
            self._optimizers.close()
            draw_for(None)
            if self._looks:
                if self._meeting is not None and sys.exc_info()[0] is None:
                    self._warn_of_counts(self._meeting.differing(self._streams()))
                self._looks, self._meeting = False, None
            if apart := take_apart():
                self._warn_of_parts(apart)
            if self._loose and has_drawn():
                self._log()
        if self._exchanged:
            self._exchanged = False
            drawn = self._host.put_back()
            self.used = drawn if self.used is None else self.used
        if self._several:
            torch.default_generator.set_state(self._own[0])
            if self._module is not None:
                self._module.set_rng_state(self._own[1])

    def around(self, iter_batches: Iterator[RankBatch], split: str, epoch: int, skip: int = 0) -> Iterator[RankBatch]:
        """Yields an epoch's shares, each within its step; so many of the first ones were before them."""
        self.begin(split, epoch, skip)
        for rank_batch in iter_batches:
            self.enter(rank_batch)
            try:
                yield rank_batch
            finally:
                self.leave()

    def _streams(self) -> dict[str, int]:
        """Checksums of where the streams are that the step has drawn from."""
        states = [torch.default_generator.get_state()] + (
            [] if self._module is None else [self._module.get_rng_state()]
        )
        found = {"torch": zlib.crc32(b"".join(bytes(state.numpy()) for state in states))}
        return found | (self._host.places() if self._exchanged else {})

    def _warn_of_counts(self, streams: list[str]) -> None:
        if streams:
            logger.warning(
                "same_draws: in the first %s step the ranks, which have different numbers of samples, took different "
                "numbers of random numbers from %s: for each sample in turn, or with a function that dtrain does not "
                "lead. They are not those that one process draws. Draw with torch, for all samples at once, as in "
                "torch.rand(len(x), 2).",
                *(self._split, " and ".join(streams)),
            )

    def _warn_of_parts(self, apart: set[str]) -> None:
        new = sorted(apart - self._warned)
        self._warned |= apart
        if new and self._main:
            logger.warning(
                "same_draws: the %s step draws %s: a rank draws it for its own samples, and not as one process would.",
                *(self._split, "; ".join(new)),
            )

    def _log(self) -> None:
        self._silent, self._loose = True, False
        logger.warning(
            "same_draws: the %s step draws random numbers, and its batches are not stacked tensors, so dtrain cannot "
            "tell which numbers are this rank's: they may differ from those of a single process.",
            self._split,
        )


def _is_stacked(batch: Any, rows: int) -> bool:
    """Whether all that is in a batch has its samples as rows or, time first, as columns."""
    if isinstance(batch, Tensor):
        return not batch.is_nested and (batch.ndim == 0 or rows in batch.shape[:2])
    if isinstance(batch, (Mapping, list, tuple)):
        return all(_is_stacked(part, rows) for part in (batch.values() if isinstance(batch, Mapping) else batch))
    return isinstance(batch, (str, int, float, np.ndarray, type(None)))


class _Replica(Protocol):
    net: nn.Module

    @property
    def clock(self) -> object:
        """None where the net is not compiled, whose random numbers else are compiled with it."""


def step_draws(  # noqa: PLR0913, PLR0917 - what a run says of it
    world: World, seed: int, replica: _Replica, batch: BatchMode, wanted: bool | None, loaders: int = 1
) -> tuple[StepDraws | None, ...]:
    """Returns what leads the random numbers of train steps, and of each validation loader's; see `draws_of`."""
    compiled = replica.clock is not None
    return tuple(draws_of(replica.net, world, seed, batch, wanted, compiled=compiled) for _ in range(1 + loaders))


def draws_of(  # noqa: PLR0913 - what a run says of it
    net: nn.Module, world: World, seed: int, batch: BatchMode, wanted: bool | None, *, compiled: bool
) -> StepDraws | None:
    """Returns what leads the random numbers of a split's steps; None where each rank draws numbers of its own.

    Args:
        net: which the steps call.
        world: the ranks.
        seed: the run's.
        batch: whose batch size the loaders' is.
        wanted: None: where the loaders' batches are the whole world's.
        compiled: whether the net is compiled.

    Raises:
        UsageError: it is asked for, and cannot be had.
    """
    if world.size > 1 and compiled and wanted:
        raise UsageError(
            "same_draws: a compiled net draws random numbers of its own on each rank. Disable same_draws or compile."
        )
    if wanted is None:
        wanted = world.size == 1 or (batch == "global" and not compiled)
    if not wanted:
        return None
    if world.size > 1:
        check_supported()
    return StepDraws(world, seed, shapes_of(net.parameters()), net.parameters)
