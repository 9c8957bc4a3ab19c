"""The live bar of a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.progress.facts import PassFacts
from dtrain.progress.plain import epoch_line, metrics_text

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from dtrain.metrics import MeanTable

_REDRAW_SECONDS = 0.1


class LiveBar:
    """A bar for the pass that runs, with loss, metric, rate and time left; above it a line for each epoch.

    Args:
        epochs: number of epochs of the run.
    """

    def __init__(self, epochs: int) -> None:
        from rich.console import Console

        self._epochs = epochs
        self._console = Console(highlight=False, markup=False)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._begun = self._drawn = 0.0

    def begin(self, facts: PassFacts) -> None:
        """Starts the bar anew for a pass."""
        bar = self._started()
        if self._task is not None:
            bar.remove_task(self._task)
        label = f"epoch {facts.epoch}/{self._epochs} {facts.split}"
        self._task = bar.add_task(label, total=facts.steps, means="", rate="")
        self._begun = self._drawn = time.monotonic()

    def step(self, table: MeanTable) -> None:
        """Redraws, at most ten times a second, so that short steps cost nothing."""
        now = time.monotonic()
        if self._bar is None or self._task is None or now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        rate = table.steps / max(now - self._begun, 1e-9)
        self._bar.update(
            self._task,
            completed=table.steps,
            means=metrics_text(table.running(), between="  "),
            rate=f"{rate:.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s",
        )

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Prints the epoch's line above the bar."""
        self._console.print(epoch_line(row), soft_wrap=True)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _started(self) -> RichProgress:
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[means]}", markup=False),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._bar.start()
        return self._bar
