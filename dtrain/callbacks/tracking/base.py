"""What every tracker offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunEnd:
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


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of once.

    Attributes:
        folder: the run's folder.
        config: the resolved config.
        about: what `dtrain.callbacks.tracking.about.about_run` returned.
        ids: tracker's name -> its id of the run that is gone on with; it is not there for a new one.
        updates: optimizer steps of the run so far.
    """

    folder: Path
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    ids: Mapping[str, str] = field(default_factory=dict)
    updates: int = 0


class Tracker(Protocol):
    """What a run tells a tracker. No method waits for a network, but `finish`, and that for a bounded time."""

    name: str

    def run_id(self) -> str:
        """Returns what a resumed run needs to go on with the same one; "" while it is not known."""

    def log_steps(self, values: Mapping[str, float], step: int) -> None:
        """Takes the values of a moment; `step` counts optimizer steps."""

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Takes one epoch's row of the history, which is not computed anew."""

    def finish(self, end: RunEnd) -> None:
        """Ends the tracker's run. Raises nothing that is the tracker's own trouble: that is told in a line."""
