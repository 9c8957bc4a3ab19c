"""The random numbers of steps, so that they are the same on any number of ranks.

Before each step torch's default generators, those that dropout draws from, are seeded from the run's seed, the epoch
and the place of the step's global batch in the loader's order. With one rank that is all. With several, the step's
random functions draw for the whole global batch, and keep this rank's rows (`dtrain.rowwise`); what is drawn outside of
steps, such as augmentation in the main process, comes from the rank's own streams.

So no number depends on what was drawn before the step, and a run that is resumed, on whatever number of ranks, draws
what it would have drawn. Python's and NumPy's generators are seeded alike where an epoch's first step draws from them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.dealing import BatchMode, Share
from dtrain.errors import UsageError
from dtrain.rowwise import Part, check_supported, draw_for, has_drawn, shapes_of
from dtrain.seeding import derive, load_random_state, random_state, seed_everything_on_cpu
from dtrain.world import World

logger = logging.getLogger(__name__)

_BITS = (1 << 63) - 1


class StepDraws:
    """Leads the random numbers of one split's steps.

    Args:
        world: the ranks.
        seed: the run's.
        shapes: as for `dtrain.rowwise.Part`.

    Attributes:
        used: whether the steps draw from Python's or NumPy's generators; None before an epoch's first step.
    """

    def __init__(self, world: World, seed: int, shapes: frozenset[tuple[int, ...]] = frozenset()) -> None:
        self.used: bool | None = None
        self._seed = seed
        self._device = world.device
        none = world.device.type in ("cpu", "meta")  # of which there are no generators of their own
        self._module: Any = None if none else torch.get_device_module(world.device)
        self._several = world.size > 1
        self._shapes = shapes
        self._base = 0
        self._own: Any = None  # the rank's own streams, while a step has the common ones
        self._inside = False
        self._seeded: Any = None
        self._silent = not world.is_main
        self._split = ""
        self._loose = False  # whether the step's batch is no stacked tensors

    def begin(self, split: str, epoch: int, skip: int = 0) -> None:
        """An epoch's pass begins, or is gone on with after so many steps."""
        if skip == 0:
            self.used = None
        self._split = split
        self._base = derive(self._seed, "random", split, epoch)

    def enter(self, share: Share) -> None:
        """A step begins."""
        self._inside = True
        seed = (self._base + share.whole_start) & _BITS
        if self.used is not False:
            self._enter_all(seed)
        elif self._several:
            self._own = torch.default_generator.get_state(), self._module and self._module.get_rng_state()
        torch.default_generator.manual_seed(seed)
        if self._module is not None:
            self._module.manual_seed(seed)
        if self._several and share.rows < share.total:
            self._loose = not self._silent and not _is_stacked(share.batch, share.rows)
            draw_for(Part(share.start - share.whole_start if share.count else 0, share.rows, share.total, self._shapes))

    def leave(self) -> None:
        """The step is over; nothing is done where none has begun."""
        if not self._inside:
            return
        self._inside = False
        if self._several:
            draw_for(None)
            if self._loose and has_drawn():
                self._tell()
        if self.used is not False:
            self._leave_all()
        elif self._several:
            torch.default_generator.set_state(self._own[0])
            if self._module is not None:
                self._module.set_rng_state(self._own[1])

    def around(self, shares: Iterator[Share], split: str, epoch: int) -> Iterator[Share]:
        """Yields an epoch's shares, each within its step."""
        self.begin(split, epoch)
        for share in shares:
            self.enter(share)
            try:
                yield share
            finally:
                self.leave()

    def _tell(self) -> None:
        self._silent, self._loose = True, False
        logger.warning(
            "same_draws: the %s step draws random numbers, and its batches are no stacked tensors, so that dtrain "
            "cannot tell which numbers are this rank's: they may differ from those of one process.",
            self._split,
        )

    def _enter_all(self, seed: int) -> None:
        if self._several or self.used is None:
            self._own = random_state(self._device)
        seed_everything_on_cpu(seed)
        if self.used is None:
            self._seeded = random.getstate(), np.random.get_state()

    def _leave_all(self) -> None:
        if self.used is None:
            self.used = random.getstate() != self._seeded[0] or not _equal(np.random.get_state(), self._seeded[1])
        elif not self._several:
            return
        own = self._own
        if not self._several:
            if self.used:
                return
            own = {**own, "torch": torch.get_rng_state(), "device": None}
        load_random_state(own, self._device)


def _is_stacked(batch: Any, rows: int) -> bool:
    """Whether all that is in a batch has its samples as rows or, time first, as columns."""
    if isinstance(batch, Tensor):
        return not batch.is_nested and (batch.ndim == 0 or rows in batch.shape[:2])
    if isinstance(batch, (Mapping, list, tuple)):
        return all(_is_stacked(part, rows) for part in (batch.values() if isinstance(batch, Mapping) else batch))
    return isinstance(batch, (str, int, float, np.ndarray, type(None)))


def _equal(one: Any, other: Any) -> bool:
    return bool(one[2:] == other[2:] and (one[1] == other[1]).all())


class _Replica(Protocol):
    net: nn.Module

    @property
    def clock(self) -> object:
        """None where the net is not compiled, whose random numbers else are compiled with it."""


def step_draws(
    world: World, seed: int, replica: _Replica, batch: BatchMode, wanted: bool | None
) -> tuple[StepDraws | None, StepDraws | None]:
    """Returns what leads the random numbers of train and of valid steps; see `draws_of`."""
    train, valid = (
        draws_of(replica.net, world, seed, batch, wanted, compiled=replica.clock is not None) for _ in range(2)
    )
    return train, valid


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
            "same_draws: a compiled net draws random numbers of its own on each rank. Leave same_draws or compile out."
        )
    if wanted is None:
        wanted = world.size == 1 or (batch == "global" and not compiled)
    if not wanted:
        return None
    if world.size > 1:
        check_supported()
    return StepDraws(world, seed, shapes_of(net.parameters()))
