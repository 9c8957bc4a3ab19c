"""Validation within an epoch, after every so many optimizer steps, by which the training around it is not changed.

::

    weights, averaged where there is an average; rank 0's buffers on all ranks; net.eval()
    a validation as at an epoch's end
    weights, buffers, each module's mode, random streams, the users' generators: as they were

Its torchmetrics objects are copies, since the train pass is in the midst of using the task's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from dtrain.distributed.seeding import load_random_state, random_state
from dtrain.distributed.world import World
from dtrain.engine.callback import Callbacks, each
from dtrain.engine.facts import RunFacts
from dtrain.engine.metrics import PassResult
from dtrain.engine.passes import PassWatch
from dtrain.engine.position import TrainPosition
from dtrain.engine.valid_passes import Validation
from dtrain.errors import UsageError
from dtrain.rundir.columns import VALID
from dtrain.rundir.history import History


class WithinEpoch:
    """Validates after every so many optimizer steps; each time is a row of its history.

    Args:
        every: optimizer steps from one to the next.
        valid: the validation at an epoch's end.
        world: the ranks.
        place: where the run is.
        generators: returns the generators that the user gave the loaders.
        averaged: puts the averaged weights into the net while inside, where there is an average.
        history: returns where rows are added: epoch, step (optimizer steps since the run began), val_..., seconds.
        watch: of the train pass around it, whose time this is no part of.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - made at one place, with all of them
        self,
        every: int,
        valid: Validation,
        world: World,
        place: TrainPosition,
        generators: Callable[[], list[torch.Generator]],
        averaged: Callable[[], AbstractContextManager[None]],
        history: Callable[[], History],
        watch: PassWatch,
    ) -> None:
        self._watch = watch
        self._history = history
        self._every = every
        self._pass = valid.aside()
        self._world, self._place = world, place
        self._generators, self._averaged = generators, averaged
        self._last: tuple[int, PassResult, _Streams] | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is time, and it was not done yet."""
        step = self._place.updates
        return (
            step > 0
            and self._place.passed(self._every)
            and [row["step"] for row in self._history().rows[-1:]] != [step]
        )

    def run(self, calls: Callbacks, facts: RunFacts) -> None:
        """Validates, and adds the row.

        Raises:
            StopRequested: a rank was asked to stop meanwhile; all ranks raise it, and the run that goes on validates.
            Exception: as at an epoch's end.
        """
        place = self._place
        with self._watch.stopped():
            with self._aside() as streams:
                with self._averaged():
                    result = self._pass.run(place.epoch, place, calls, facts, within=True)
                self._last = place.updates, result, streams.now()
            means = {f"{VALID}{name}": mean for name, mean in result.means.items()}
            row = {"epoch": place.epoch, "step": place.updates, **means, "seconds": result.seconds}
            self._history().append(row)
            each(calls.on_validation_end, row)

    def taken_up(self) -> PassResult | None:
        """Returns the last result, where no step was taken since: the epoch's validation would do the same again."""
        last, self._last = self._last, None
        if last is None or last[0] != self._place.updates:
            return None
        last[2].put_back()
        return last[1]

    @contextlib.contextmanager
    def _aside(self) -> Iterator[_Streams]:
        """While inside, anything may be done with the net; then the training finds all as it was."""
        module, place = self._pass.module, self._place
        modes = [(part, part.training) for part in module.modules()]
        buffers = list(module.buffers())
        before = [buffer.clone() for buffer in buffers]
        streams = _Streams(self._world.device, self._generators(), self._pass)
        self._world.broadcast_(buffers)  # each rank has its own while it trains
        with place.aside():
            try:
                yield streams
            finally:
                streams.put_back()
                _copy(before, buffers)
                for part, training in modes:
                    part.training = training


class _Streams:
    """The random streams of this process, the users' generators and the loader's states, as when this is made."""

    def __init__(self, device: torch.device, generators: list[torch.Generator], valid: Validation) -> None:
        self._device, self._generators, self._valid = device, generators, valid
        self._sources_states = [part.loader.sources.states() for part in valid.parts]
        self._state = random_state(device)
        self._states = [generator.get_state() for generator in generators]

    def now(self) -> _Streams:
        """Returns the same ones as they are now."""
        return _Streams(self._device, self._generators, self._valid)

    def put_back(self) -> None:
        """Has them go on from where they were."""
        load_random_state(self._state, self._device)
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        for part, states in zip(self._valid.parts, self._sources_states, strict=True):
            if states:
                part.loader.sources.load(states)


@torch.no_grad()
def _copy(sources: list[Any], targets: list[Any]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def within_epochs(  # noqa: PLR0913, PLR0917 - made at one place, with all of them
    every: int | None,
    valid: Validation | None,
    world: World,
    place: TrainPosition,
    generators: Callable[[], list[torch.Generator]],
    averaged: Callable[[], AbstractContextManager[None]],
    history: Callable[[], History],
    watch: PassWatch,
) -> WithinEpoch | None:
    """Returns what validates within epochs; None where that is not asked for.

    Raises:
        UsageError: there is no validation loader, or one that is used up after one pass.
    """
    if every is None:
        return None
    if valid is None:
        raise UsageError(
            f"train.val_every_steps = {every}: there is no validation loader. Define one, or remove val_every_steps."
        )
    if any(isinstance(part.loader.loader, Iterator) for part in valid.parts):
        raise UsageError(
            f"train.val_every_steps = {every}: the validation loader is exhausted after one pass: it is an iterator "
            "or a generator. Use a DataLoader, or an object whose __iter__ starts over."
        )
    return WithinEpoch(every, valid, world, place, generators, averaged, history, watch)
