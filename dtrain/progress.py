"""What a person sees while it runs: a live bar on a terminal, plain lines elsewhere, from global rank 0 alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from dtrain.metrics import MeanTable

_REDRAW_SECONDS = 0.1
# Columns of a row that are no metrics; the line of an epoch shows them in its own way, or not.
_FACTS = ("epoch", "lr", "seconds", "samples_per_second")


class Progress(Protocol):
    """What the engine tells of its progress; all methods are cheap."""

    def begin(self, split: str, epoch: int, steps: int | None) -> None:
        """A pass over a split begins; `steps` is None where the loader cannot tell."""

    def step(self, table: MeanTable) -> None:
        """A step is done; `table` has the running means of this rank."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done; `row` is its row of the history."""

    def close(self) -> None:
        """The run is over, well or not. May be called twice."""


class Silent:
    """Says nothing: every rank but 0, and runs that asked for it."""

    def begin(self, split: str, epoch: int, steps: int | None) -> None:
        """Says nothing."""

    def step(self, table: MeanTable) -> None:
        """Says nothing."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Says nothing."""


class PlainLines:
    """Lines in the tutorial's manner: one every `log_step_freq` train steps, one after each epoch.

    The means within an epoch are rank 0's own so far; those of an epoch are exact over all ranks.

    Args:
        epochs: number of epochs of the run.
        log_step_freq: train steps between two lines.
        out: where to, by default the standard output.
    """

    def __init__(self, epochs: int, log_step_freq: int, out: TextIO | None = None) -> None:
        self._epochs = epochs
        self._freq = log_step_freq
        self._out = out
        self._training = False

    def begin(self, split: str, epoch: int, steps: int | None) -> None:
        """Prints a head line before the train pass."""
        self._training = split == "train"
        if self._training:
            of_steps = "" if steps is None else f", {steps} steps"
            self._print(f"epoch {epoch}/{self._epochs}{of_steps}")

    def step(self, table: MeanTable) -> None:
        """Prints a line at every `log_step_freq`-th train step."""
        if self._training and table.steps % self._freq == 0:
            self._print(f"[step = {table.steps}] {metrics_text(table.running())}")

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Prints the epoch's line."""
        self._print(epoch_line(row))

    def close(self) -> None:
        """Nothing is held open."""

    def _print(self, line: str) -> None:
        print(line, file=self._out or sys.stdout, flush=True)


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

    def begin(self, split: str, epoch: int, steps: int | None) -> None:
        """Starts the bar anew for a pass."""
        bar = self._started()
        if self._task is not None:
            bar.remove_task(self._task)
        label = f"epoch {epoch}/{self._epochs} {split}"
        self._task = bar.add_task(label, total=steps, means="", rate="")
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


def metrics_text(values: Mapping[str, float], between: str = ", ") -> str:
    """Returns "loss: 0.312, accuracy: 0.901"."""
    return between.join(f"{name}: {value:.3f}" for name, value in values.items())


def epoch_line(row: Mapping[str, Any]) -> str:
    """Returns the tutorial's line for an epoch: its metrics and how long it took."""
    parts = [f"{name} = {value:.3f}" for name, value in row.items() if name not in _FACTS]
    return f"EPOCH = {row['epoch']}, {', '.join(parts)}, time = {row['seconds']:.1f}s"


def choose_progress(*, is_main: bool, epochs: int, log_step_freq: int) -> Progress:
    """Returns the live bar for a terminal, plain lines for anything else, silence for other ranks."""
    if not is_main:
        return Silent()
    if sys.stdout.isatty():
        return LiveBar(epochs)
    return PlainLines(epochs, log_step_freq)
