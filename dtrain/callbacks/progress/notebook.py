"""The view of a notebook: a bar, a table of the epochs and their curves, in one output that is updated in place."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.callbacks.progress.clock import Clock, short_number, short_time
from dtrain.callbacks.progress.curve import curves_svg
from dtrain.callbacks.progress.paced import Paced
from dtrain.callbacks.progress.plain import epoch_line, metrics_text
from dtrain.wording import number

_UPDATE_SECONDS = 0.5
_MOST_ROWS = 20  # of a long run's table, half of them its first, half its last


class NotebookView(Paced):
    """Shows progress under a notebook's cell; the last state stays there, and in the notebook's file.

    Args:
        curves: whether curves are drawn below the table.

    It updates from `on_progress` and after an epoch, at most twice a second, and when all is over.
    """

    def __init__(self, *, curves: bool = True) -> None:
        super().__init__()
        self._draws = curves
        self._rows: list[Mapping[str, Any]] = []
        self._handle: Any = None
        self._curves = ""

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Adds an epoch's row, and draws its curves."""
        now = time.monotonic()
        self._clock.end_epoch(now)
        self._rows.append(dict(row))
        self._curves = ""
        if now >= self._next:
            self._show(now)

    def close(self) -> None:
        """Shows the last state, to stay."""
        if self._handle is not None:
            self._show(time.monotonic(), over=True)

    def _show(self, now: float, *, over: bool = False) -> None:
        from IPython.display import display

        self._curves = self._curves or (curves_svg(self._rows) if self._draws else "")
        status = "" if over and self._rows else status_html(self._clock, self._values, now)
        page = f"{status}{table_html(self._rows)}{self._curves}"
        lines = "\n".join(map(epoch_line, self._rows)) or "no epoch finished yet"
        shown = {"text/html": page, "text/plain": lines}  # the second for what shows no HTML
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)
        self._next = time.monotonic() + _UPDATE_SECONDS


def status_html(clock: Clock, values: Mapping[str, float], now: float) -> str:
    """Returns a bar for the pass that runs, with its values.

    Args:
        clock: of the run.
        values: metric -> running mean of this rank.
        now: the time by the clock.
    """
    facts = clock.facts
    if facts is None:
        return ""
    total = clock.total
    bar = f'<progress max="{total}" value="{clock.steps}" style="vertical-align:middle"></progress>' if total else ""
    said = [f"epoch {facts.epoch}/{facts.epochs}, {facts.title} {clock.steps}" + (f"/{total}" if total else "")]
    rate, lr, left = clock.samples_per_second, facts.lr(), clock.run_left(now)
    said += [metrics_text(values)] if values else []
    said += [] if lr is None else [f"lr {number(lr)}"]
    said += [] if rate is None else [f"{short_number(rate)} samples/s"]
    said += [] if left is None else [f"{short_time(left)} left"]
    said += facts.run.status
    return f"<div>{bar} {html.escape(' · '.join(said))}</div>"


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of a history as a table; of a long one the first and the last."""
    if not rows:
        return ""
    names = list(rows[-1])
    half = _MOST_ROWS // 2
    cut = len(rows) > _MOST_ROWS + 1
    first, last = (rows[:half], rows[-half:]) if cut else (rows, [])
    gap = (
        f'<tr><td colspan="{len(names)}" style="text-align:center">... {len(rows) - 2 * half} more ...</td></tr>'
        if cut
        else ""
    )
    body = "".join(_row(row, names) for row in first) + gap + "".join(_row(row, names) for row in last)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else html.escape(str(value))
