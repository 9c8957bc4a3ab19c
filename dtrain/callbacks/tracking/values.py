"""A run's values in the order in which they came, read from its folder: the truth that is sent to W&B."""

from __future__ import annotations

import csv
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.callbacks.tracking.files import STEPS, Tail, mark_of, parse_lines, values_of
from dtrain.layout import HISTORY, TRACKING
from dtrain.rundir.history import value_of


@dataclass(frozen=True)
class Entry:
    """Values of one moment.

    Attributes:
        step: optimizer steps since the run began. Grows, or stays where values of a row and of a moment meet.
        at: when, in seconds since the epoch.
        values: by name.
        is_row: whether they are an epoch's row of the history.
    """

    step: int
    at: float
    values: dict[str, Any]
    is_row: bool = False


class Values:
    """Reads a run's values as they come.

    An epoch's row has the number of optimizer steps at its end, so that a run that computes it anew, after a kill,
    finds the same. A row that might yet be computed anew (see `dtrain.callbacks.tracking.files`) holds back all that
    comes after it. A column that comes late has history.csv written anew, and rows that were returned are not again.

    Args:
        run: the run's folder.

    Attributes:
        rows: those that were returned so far, as history.csv has them now.
        last: the step of the last entry returned.
    """

    def __init__(self, run: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.last = -1
        self._steps = Tail(run / TRACKING / STEPS)
        self._history = Tail(run / HISTORY, is_rewritten=True)
        self._columns: list[str] | None = None
        self._waiting: deque[dict[str, Any]] = deque()
        self._known: dict[int, dict[str, Any]] = {}  # by epoch
        self._places: dict[int, int] = {}  # in `rows`, by epoch
        self._firm = 0
        self._row_step = -1

    def news(self, *, everything: bool = False) -> list[Entry]:
        """Returns what has come since the last call.

        Args:
            everything: also rows that might yet be computed anew: nothing comes any more.
        """
        lines = parse_lines(self._steps.news())  # before the rows: a row is there before its line
        self._read_rows()
        for line in lines:
            firm = mark_of(line, "firm")
            if firm is not None:
                self._firm = max(self._firm, firm)
            else:
                self._waiting.append(line)
        found = []
        while self._waiting and (everything or (mark_of(self._waiting[0], "row") or 0) <= self._firm):
            entry = self._entry(self._waiting.popleft())
            if entry is not None:
                found.append(entry)
        if everything:
            found += self._unmarked()
        return found

    def _entry(self, line: dict[str, Any]) -> Entry | None:
        step, at = int(line.get("updates", 0)), float(line.get("at", 0.0))
        epoch = mark_of(line, "row")
        if epoch is None:
            self.last = max(step, self.last)
            return Entry(self.last, at, values_of(line))
        row = self._known.pop(epoch, None)
        return None if row is None else self._row_entry(row, step, at)

    def _row_entry(self, row: dict[str, Any], step: int, at: float) -> Entry:
        self.last = self._row_step = max(step, self.last, self._row_step + 1)
        self._places[row["epoch"]] = len(self.rows)
        self.rows.append(row)
        return Entry(self.last, at, {name: value for name, value in row.items() if value is not None}, is_row=True)

    def _unmarked(self) -> list[Entry]:
        """Rows of an epoch whose end was not noted, since a kill came between the two."""
        left, self._known = list(self._known.values()), {}
        return [self._row_entry(row, self.last + 1, 0.0) for row in left]

    def _read_rows(self) -> None:
        lines = self._history.news()
        if self._history.from_start:
            self._columns = None
        for cells in csv.reader(lines):
            if self._columns is None:
                self._columns = cells
                continue
            row = {name: value_of(cell) for name, cell in zip(self._columns, cells, strict=False)}
            epoch = row.get("epoch")
            if not isinstance(epoch, int):
                continue
            if epoch in self._places:
                self.rows[self._places[epoch]] = row
            else:
                self._known[epoch] = row
