"""What keeps a script's run, as its loops and meters meet it; see `dtrain.api.script_run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Keeper(Protocol):
    """What keeps a script's run, as its loops meet it."""

    def enter(self, loader: Any, current: Any) -> Resume | None:
        """A pass begins; None where it was done before the script was resumed."""

    def step_done(self, loader: Any, current: Any) -> None:
        """The body of a loop is done with a batch."""

    def metered(self, meter: Any, *, adds: bool) -> None:
        """A meter is used."""


@dataclass(frozen=True)
class Resume:
    """Where a pass begins.

    Attributes:
        skip: the shares of it that are done.
        ready: called once the iteration has begun.
        used: as `StepDraws.used`.
    """

    skip: int = 0
    ready: Callable[[], None] = lambda: None
    used: bool | None = None
