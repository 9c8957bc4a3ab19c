"""A run's values in the order in which they came, read from its folder: the truth that is sent to W&B."""

from __future__ import annotations

import csv
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.callbacks.tracking.files import STEPS, Tail, parse_lines
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
    comes after it.

    Args:
        run: the run's folder.

    Attributes:
        rows: those that were returned so far, as in history.csv.
        last: the step of the last entry returned.
    """

    def __init__(self, run: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.last = -1
        self._steps = Tail(run / TRACKING / STEPS)
        self._history = Tail(run / HISTORY)
        self._columns: list[str] | None = None
        self._waiting: deque[dict[str, Any]] = deque()
        self._known: dict[int, dict[str, Any]] = {}
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
            if "firm" in line:
                self._firm = max(self._firm, line["firm"])
            else:
                self._waiting.append(line)
        found = []
        while self._waiting and (everything or self._waiting[0].get("row", 0) <= self._firm):
            entry = self._entry(self._waiting.popleft())
            if entry is not None:
                found.append(entry)
        if everything:
            found += self._unmarked()
        return found

    def _entry(self, line: dict[str, Any]) -> Entry | None:
        step, at = int(line.pop("updates", 0)), float(line.pop("at", 0.0))
        if "row" not in line:
            self.last = max(step, self.last)
            return Entry(self.last, at, {name: value for name, value in line.items() if value is not None})
        row = self._known.pop(line["row"], None)
        return None if row is None else self._row_entry(row, step, at)

    def _row_entry(self, row: dict[str, Any], step: int, at: float) -> Entry:
        self.last = self._row_step = max(step, self.last, self._row_step + 1)
        self.rows.append(row)
        return Entry(self.last, at, {name: value for name, value in row.items() if value is not None}, is_row=True)

    def _unmarked(self) -> list[Entry]:
        """Rows of an epoch whose end was not noted, since a kill came between the two."""
        left, self._known = list(self._known.values()), {}
        return [self._row_entry(row, self.last + 1, 0.0) for row in left]

    def _read_rows(self) -> None:
        for cells in csv.reader(self._history.news()):
            if self._columns is None:
                self._columns = cells
                continue
            row = {name: value_of(cell) for name, cell in zip(self._columns, cells, strict=False)}
            if isinstance(row.get("epoch"), int):
                self._known[row["epoch"]] = row  # type: ignore[index]
