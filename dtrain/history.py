"""The history of a run: a row an epoch, appended to a file that is whole after any kill."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.columns import Mode, mode_of
from dtrain.errors import UsageError
from dtrain.launch.facts import read_rank_facts

if TYPE_CHECKING:
    import pandas as pd

FILE_NAME = "history.csv"

# A sync takes milliseconds, which is longer than the epochs of a tiny net. What was written outlives any end of the
# process without one; a power cut can take this long's rows.
_SYNC_SECONDS = 1.0


class History:
    """The rows of a run so far, and, where a path is given, the file that holds them.

    Args:
        path: the CSV file to create; None keeps the rows in memory alone. On ranks other than 0 the rows stay
            in memory in any case, so that every rank may make its History with the same line.

    Raises:
        UsageError: the file is there already; nothing is overwritten.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = Path(path) if path is not None and read_rank_facts().rank == 0 else None
        self._synced = float("-inf")
        if self._path is not None and self._path.exists():
            raise UsageError(
                f"{self._path} is there already and is kept as it is. Give History another path, as in "
                f'History("{self._path.stem}-2{self._path.suffix}"), or move the file away first.'
            )

    @classmethod
    def resumed(cls, path: Path, rows: list[dict[str, Any]]) -> History:
        """Returns a history that goes on after these rows; its file then holds these alone, and at no time less."""
        text = "".join(_line(cells) for cells in ([rows[0].keys()] if rows else []) + [row.values() for row in rows])
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before != text:
            part = path.with_name(f".{path.name}.part")
            part.unlink(missing_ok=True)
            _append(part, text, sync=True)
            part.replace(path)
        history = cls()
        history.rows, history._path = list(rows), path
        return history

    def append(self, row: dict[str, Any]) -> None:
        """Adds one epoch's row; with a file, writes it there, and syncs the file where it last did so a second ago.

        The line is written by one call, so that a kill leaves it whole or not there; `read_history` leaves
        out a line without its end, which a full disk may cause.

        Raises:
            OSError: the row could not be written.
        """
        if self._path is not None:
            lines = [_line(row.values())]
            if not self.rows:
                lines.insert(0, _line(row.keys()))
            now = time.monotonic()
            due = now - self._synced >= _SYNC_SECONDS
            _append(self._path, "".join(lines), sync=due)
            self._synced = now if due else self._synced
        self.rows.append(row)

    def sync(self) -> None:
        """Returns once all rows are on the disk."""
        if self._path is not None and self.rows:
            _append(self._path, "", sync=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterates over the rows, so that `pandas.DataFrame(history)` works as with a list."""
        return iter(self.rows)

    def dataframe(self) -> pd.DataFrame:
        """Returns the rows as the DataFrame `dfhistory`, a row an epoch."""
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame(self.rows)
        return frame

    def best(self) -> dict[str, Any] | None:
        """Returns the row with the lowest validation loss (training loss without validation)."""
        return best_row(self.rows)[0]


def best_row(
    rows: list[dict[str, Any]], monitor: str | None = None, mode: Mode | None = None
) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the best row, and the column that says so: of equal ones the first, without such a column the last.

    Args:
        rows: of a history.
        monitor: the column; None for `val_loss`, or `loss` where there is none.
        mode: whether its lowest or its highest value is best; None for what its name says.
    """
    for column in ("val_loss", "loss") if monitor is None else (monitor,):
        usable = [row for row in rows if isinstance(row.get(column), (int, float)) and not math.isnan(row[column])]
        if usable:
            best = min if (mode or mode_of(column)) == "min" else max
            return best(usable, key=lambda row: row[column]), column
    return (rows[-1] if rows else None), None


def read_history(path: str | Path) -> pd.DataFrame:
    """Reads a run's history.

    Args:
        path: a run's folder, or its history.csv.

    Returns:
        a row an epoch; the columns as in the file, numbers exactly as they were computed.

    Raises:
        UsageError: there is no such file, or it holds no whole row.
    """
    import pandas as pd

    file = history_file(Path(path))
    try:
        columns, rows = read_cells(file)
    except OSError as error:
        raise UsageError(f"{file}: cannot read the history: {error.strerror}.") from None
    if not rows:
        raise UsageError(f"{file}: the history has no whole row yet.")
    # pandas' own reader rounds the last digit of some numbers.
    frame: pd.DataFrame = pd.DataFrame([map(value_of, row) for row in rows], columns=columns)
    return frame


def history_file(path: Path) -> Path:
    """Returns the history's file of a run's folder, or the file itself, where one is named."""
    return path / FILE_NAME if path.is_dir() else path


def read_cells(file: Path) -> tuple[list[str], list[list[str]]]:
    """Reads a history as it is written, without pandas.

    Args:
        file: the CSV file.

    Returns:
        the names of the columns, and a list of as many cells for each whole row; a line without its end is left out.

    Raises:
        OSError: the file cannot be read.
    """
    text = file.read_text(encoding="utf-8", errors="replace").replace("\0", "")  # which a power cut may leave
    lines = [cells for cells in csv.reader(io.StringIO(text[: text.rfind("\n") + 1])) if cells]
    if not lines:
        return [], []
    columns, width = lines[0], len(lines[0])
    return columns, [[*row, *[""] * (width - len(row))][:width] for row in lines[1:]]


def value_of(cell: str) -> int | float | str | None:
    """Returns what a history's cell holds: a number to its last digit, None where it is empty, else its text."""
    if not cell:
        return None
    if cell.isascii() and "_" not in cell:  # of which Python would make numbers, too
        for kind in (int, float):
            try:
                return kind(cell)
            except ValueError:
                continue
    return cell


def _line(cells: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _append(path: Path, text: str, *, sync: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        data = text.encode()
        if os.write(descriptor, data) != len(data):
            raise OSError(f"{path}: the row was not written whole; is the disk full?")
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
