"""Times an engine's train steps as they are: nothing is done within them but to look at the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from dtrain.data.partition import RankBatch
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine

WARM_UP = 5
_MOST_SECONDS = 20.0  # after which no further pass is begun


class StepClock(EngineCallback):
    """The seconds and samples of the steps of passes, from the fetch of one batch to that of the next.

    The first steps of a pass are left out; the device has done all that it was sent before the first one that counts,
    and when the last one is over.

    Args:
        wait: returns once the device has done what it was sent.
        skip: so many steps of each pass are left out.

    Attributes:
        seconds: of all steps that counted.
        samples: real samples of those, of all ranks.
        steps: how many there were.
    """

    order = Order.RECORDS

    def __init__(self, wait: Callable[[], object], skip: int) -> None:
        self.seconds, self.samples, self.steps = 0.0, 0, 0
        self.skip = skip
        self._wait = wait
        self._begun = self._counted = 0
        self._from = self._last = 0.0
        self._samples = 0

    def on_fetch_start(self) -> None:
        """A step begins, and the one before it is over."""
        if self._begun == self.skip:
            self._wait()
            self._from, self._samples, self._counted = time.perf_counter(), 0, 0
        self._last = time.perf_counter()
        if self._begun > self.skip:
            self._counted += 1
        self._begun += 1

    def on_fetch_end(self, *, found: bool) -> None:
        """There is a batch, or the pass is over."""
        if found:
            return
        if self._counted:
            waited = time.perf_counter()
            self._wait()
            self.seconds += self._last - self._from + time.perf_counter() - waited
            self.steps += self._counted
            self.samples += self._samples
        elif self._begun > 1:  # the pass is so short
            self.skip = max(0, self._begun - 2)
        self._begun = self._counted = 0

    def on_batch_start(self, batch: RankBatch) -> None:
        """The batch is on the device."""
        if self._begun > self.skip:
            self._samples += batch.total


def waiter(world: World) -> Callable[[], object]:
    """Returns what waits until a rank's device has done what it was sent."""
    return (lambda: None) if world.device.type == "cpu" else torch.accelerator.synchronize


def time_steps(engine: Engine, steps: int, skip: int = WARM_UP, first: int = 1) -> StepClock:
    """Trains for as many passes as so many steps take, and times them.

    Args:
        engine: has trained, or has its first steps left out.
        steps: to be timed; fewer where passes are short and take long.
        skip: first steps of each pass that are left out, as far as it has more.
        first: the number of the first pass.
    """
    world = engine.world
    length = engine.train_loader.steps()
    clock = StepClock(waiter(world), skip if length is None else min(skip, max(0, length - 1)))
    began = time.perf_counter()
    with engine.callbacks.having(clock):
        for number in range(first, first + 2 * steps):
            engine.train_pass(number)
            over = clock.steps >= steps or (clock.steps > 0 and time.perf_counter() - began > _MOST_SECONDS)
            if world.gather_json(over)[0]:
                break
    return clock
