"""What the live views have in common: they show what there is now and then, never at every step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.callbacks.progress.clock import Clock
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.facts import PassFacts

if TYPE_CHECKING:
    from dtrain.engine.metrics import MeanTable


class Paced(EngineCallback):
    """Follows a pass. A view says in `_show` what it shows, and sets `_next`, before which it shows nothing again."""

    order = Order.PROGRESS

    def __init__(self) -> None:
        self._clock = Clock()
        self._values: Mapping[str, float] = {}
        self._next = 0.0
        self._around: tuple[Clock, Mapping[str, float]] | None = None  # of the train pass that a validation is within

    def on_pass_start(self, facts: PassFacts) -> None:
        """A pass begins."""
        now = time.monotonic()
        if facts.within:
            self._around = self._clock, self._values
            self._clock = Clock()
        self._clock.begin(facts, now)
        self._values = {}
        if now >= self._next:
            self._show(now)

    def on_progress(self, table: MeanTable) -> None:
        """A step is done: a look at the clock, so that short steps cost nothing."""
        now = time.monotonic()
        if now < self._next:
            return
        self._clock.look(table.steps, now)
        self._values = table.running()
        self._show(now)

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """A validation within an epoch is done: the train pass is shown again."""
        if self._around is not None:
            (self._clock, self._values), self._around = self._around, None

    def _show(self, now: float) -> None:
        raise NotImplementedError
