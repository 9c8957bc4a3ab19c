"""What every tracker offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class End:
    """How a run ended, for its trackers.

    Attributes:
        failed: whether it did not end as it should.
        complete: whether it came to its end, and was not stopped or failed.
        rows: its history, whole.
        weights: file with the weights that are to be kept there, None for none.
    """

    failed: bool = False
    complete: bool = True
    rows: tuple[Mapping[str, Any], ...] = ()
    weights: Path | None = None


class Tracker(Protocol):
    """What a run tells a tracker. No method waits for a network, but `finish`, and that for a bounded time."""

    name: str

    def run_id(self) -> str:
        """Returns what a resumed run needs to go on with the same one; "" while it is not known."""

    def log_steps(self, values: Mapping[str, float], step: int) -> None:
        """Takes the values of a moment; `step` counts optimizer steps."""

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Takes one epoch's row of the history, which is not computed anew."""

    def finish(self, end: End) -> None:
        """Ends the tracker's run. Raises nothing that is the tracker's own trouble: that is told in a line."""
