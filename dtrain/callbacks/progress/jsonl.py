"""Progress as events, for programs to read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.callbacks.progress.clock import Clock
from dtrain.callbacks.progress.events import Events
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.facts import PassFacts

if TYPE_CHECKING:
    from dtrain.engine.metrics import MeanTable


class JsonLines(EngineCallback):
    """An event every `log_step_freq` train steps, after each validation within an epoch, and after each epoch.

    The means within an epoch are this rank's own so far (`running`); the row of an epoch is that of the history.

    Args:
        events: takes them.
        log_step_freq: train steps between two events.
        rank: this one.
    """

    order = Order.PROGRESS

    def __init__(self, events: Events, log_step_freq: int, rank: int = 0) -> None:
        self._events = events
        self._freq = log_step_freq
        self._rank = rank
        self._clock = Clock()
        self._training = False

    def on_pass_start(self, facts: PassFacts) -> None:
        """A pass begins, of which nothing is to be said yet."""
        self._training = facts.split == "train"
        if facts.within:
            return
        self._clock.begin(facts, time.monotonic())

    def on_progress(self, table: MeanTable) -> None:
        """Tells of every `log_step_freq`-th train step."""
        if not self._training or table.steps % self._freq:
            return
        clock, now = self._clock, time.monotonic()
        clock.look(table.steps, now)
        facts = clock.facts
        if facts is None:
            return
        self._events.tell(
            "step",
            epoch=facts.epoch,
            step=table.steps,
            steps=facts.steps,
            updates=facts.updates(),
            running=table.running(),
            of_rank=self._rank,
            lr=facts.lr(),
            samples_per_second=clock.samples_per_second,
            seconds_left=clock.run_left(now),
        )

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Tells an epoch's row of the history."""
        self._clock.end_epoch(time.monotonic())
        self._events.tell("epoch", epoch=row["epoch"], row=row)

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """Tells the row of a validation within the epoch, whose train pass goes on."""
        self._training = True
        self._events.tell("validation", epoch=row["epoch"], updates=row["step"], row=row)
