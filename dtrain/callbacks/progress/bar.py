"""The live view of a terminal: a bar for the pass that runs, one for the run, and the values so far."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from dtrain.callbacks.progress.paced import Paced
from dtrain.engine.facts import PassFacts

if TYPE_CHECKING:
    from dtrain.callbacks.progress.lines import Part

_REDRAW_SECONDS = 0.1
_MOST_SHARE = 0.02  # of the time that drawing may take, where a terminal or a device is slow to answer
_LEAST_ROWS = 6  # of a terminal that has room for more than one line


class LiveBar(Paced):
    """Bars with loss, metrics, learning rate, samples a second and time left; above them a line for each epoch, and
    for each validation within one.

    It draws from `on_progress` alone, at most ten times a second: there is no thread that a fork could catch with a
    lock.

    Args:
        out: the terminal, by default the standard output.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        from rich.console import Console

        from dtrain.callbacks.progress.lines import ASCII, FINE
        from dtrain.callbacks.progress.region import Region, StdoutRedirect

        super().__init__()
        self._out = out or sys.stdout
        self._console = Console(file=self._out, highlight=False, markup=False)
        self._glyphs = FINE if self._console.encoding.startswith("utf") else ASCII
        self._region = Region(self._out, lambda: self._size()[0])
        self._surrounded = StdoutRedirect(self._region)
        self._shown = False

    def on_pass_start(self, facts: PassFacts) -> None:
        """Draws the bars anew for a pass."""
        if not self._shown:
            self._surrounded.begin()
            self._shown = True
        super().on_pass_start(facts)

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Prints the epoch's line above the bars."""
        from dtrain.callbacks.progress.lines import epoch_parts

        self._clock.end_epoch(time.monotonic())
        parts = epoch_parts(row, self._size()[0] - 1, self._glyphs)
        self._region.print(self._styled(parts) + "\n")

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """Prints the line of a validation within the epoch above the bars."""
        from dtrain.callbacks.progress.lines import validation_parts

        super().on_validation_end(row)
        parts = validation_parts(row, self._size()[0] - 1, self._glyphs)
        self._region.print(self._styled(parts) + "\n")

    def close(self) -> None:
        """Takes the bars off the screen."""
        if self._shown:
            self._shown = False
            self._surrounded.end()
            self._region.clear()

    def _show(self, now: float) -> None:
        from dtrain.callbacks.progress.lines import lines_of

        columns, rows = self._size()
        lines = lines_of(self._clock, self._values, now, columns - 1, self._glyphs)
        most = len(lines) if rows >= _LEAST_ROWS else 1 if rows > 1 else 0
        self._region.draw([self._styled(line) for line in lines[:most]])
        done = time.monotonic()
        self._next = done + max(_REDRAW_SECONDS, (done - now) / _MOST_SHARE)

    def _size(self) -> tuple[int, int]:
        """Columns and rows, as they are now."""
        try:
            size = os.get_terminal_size(self._out.fileno())
        except (OSError, ValueError, AttributeError):
            size = os.terminal_size((0, 0))
        return size.columns or self._console.width, size.lines or self._console.height

    def _styled(self, parts: Sequence[Part]) -> str:
        from rich.style import Style

        system = self._console._color_system if not self._console.no_color else None
        return "".join(Style.parse(style).render(text, color_system=system) if style else text for style, text in parts)
