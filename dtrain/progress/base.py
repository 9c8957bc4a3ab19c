"""Who listens to the engine: the protocol, nobody, and several at once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dtrain.progress.facts import PassFacts

if TYPE_CHECKING:
    from dtrain.metrics import MeanTable


class Progress(Protocol):
    """What the engine tells of its progress; all methods are cheap."""

    def begin(self, facts: PassFacts) -> None:
        """A pass over a split begins."""

    def step(self, table: MeanTable) -> None:
        """A step is done; `table` has the running means of this rank, and reading them waits for the device."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done; `row` is its row of the history."""

    def validated(self, row: Mapping[str, Any]) -> None:
        """A validation within an epoch is done; `row` has its epoch, step, values and seconds."""

    def close(self) -> None:
        """The run is over, well or not. May be called twice."""


class Silent:
    """Says nothing: every rank but 0, and runs that asked for it."""

    def begin(self, facts: PassFacts) -> None:
        """Says nothing."""

    def step(self, table: MeanTable) -> None:
        """Says nothing."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Says nothing."""

    def validated(self, row: Mapping[str, Any]) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Says nothing."""


class Several:
    """Passes all on to several listeners, in their order; `together` leaves it out where one is enough.

    Args:
        parts: the listeners.
    """

    def __init__(self, *parts: Progress) -> None:
        self.parts = parts

    def begin(self, facts: PassFacts) -> None:
        """A pass over a split begins."""
        for part in self.parts:
            part.begin(facts)

    def step(self, table: MeanTable) -> None:
        """A step is done."""
        for part in self.parts:
            part.step(table)

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done."""
        for part in self.parts:
            part.end_epoch(row)

    def validated(self, row: Mapping[str, Any]) -> None:
        """A validation within an epoch is done."""
        for part in self.parts:
            part.validated(row)

    def close(self) -> None:
        """Closes each one, also where another one cannot be closed."""
        with contextlib.ExitStack() as closing:
            for part in reversed(self.parts):
                closing.callback(part.close)


def together(*parts: Progress) -> Progress:
    """Returns one listener for all of these: that one itself where there is but one that says anything."""
    heard = [part for part in parts if not isinstance(part, Silent)]
    if len(heard) > 1:
        return Several(*heard)
    return heard[0] if heard else Silent()
