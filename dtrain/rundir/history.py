"""The history of a run: a row an epoch, appended to a file that is whole after any kill."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import UsageError
from dtrain.files import append_whole, aside_name, open_below, read_below, write_below
from dtrain.launch.env.rank_env import read_rank_facts
from dtrain.layout import HISTORY
from dtrain.rundir.cells import Table, is_row, line_of, normal_text, parse_table
from dtrain.rundir.columns import NO_METRICS, Mode, mode_of, watched

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


# A sync takes milliseconds, which is longer than the epochs of a tiny net. What was written outlives any end of the
# process without one; a power cut can take this long's rows.
_SYNC_SECONDS = 1.0

_NAN = str(math.nan)  # a cell of a row from before its column

# What stands in the file's place is another one, or no file at all.
_NOT_THE_FILE = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO)


class History:
    """The rows of a run so far, and, where a path is given, the file that holds them.

    A file that was changed, exchanged or removed since its last row is written anew, with all rows; what was in its
    place is kept under another name. The path means the same after a change of the working directory.

    Args:
        path: the CSV file to create; None keeps the rows in memory alone. On ranks other than 0 the rows stay
            in memory in any case, so that every rank may make its History with the same line.

    Raises:
        UsageError: the file is there already; nothing is overwritten.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.guard: Callable[[], None] = lambda: None
        self._path = Path(path).absolute() if path is not None and read_rank_facts().rank == 0 else None
        self._mark: tuple[int, int] | None = None  # the file as it was left: its number and size
        self._synced = float("-inf")
        if self._path is not None and os.path.lexists(self._path):
            raise UsageError(
                f"{path} already exists and is not overwritten. Use another path, such as "
                f'History("{self._path.stem}-2{self._path.suffix}"), or move the file first.'
            )

    @classmethod
    def resumed(cls, path: Path, rows: list[dict[str, Any]]) -> History:
        """Returns a history that continues after these rows; its file then holds these alone, and at no time less.

        Rows of later epochs, which are computed again, go. Anything else that was in the file is kept under another
        name, and a warning says so.
        """
        history = cls()
        history.rows, history._path = list(rows), path.absolute()
        if os.path.lexists(path) or rows:
            history._bring_back(history._path, sync=True, quiet=_is_known)
        return history

    def append(self, row: dict[str, Any]) -> None:
        """Adds one epoch's row; with a file, writes it there, and syncs the file where it last did so a second ago.

        The line is written by one call, so that a kill leaves it whole or not there; `read_history` leaves
        out a line without its end, which a full disk may cause. A column that the row lacks is NaN in it; one that it
        has first is NaN in the rows before, and the file is written anew.

        Raises:
            OSError: the row could not be written.
        """
        row = self._aligned(row)
        if self._path is not None:
            lines = [line_of(row.values())]
            if not self.rows:
                lines.insert(0, line_of(row.keys()))
            now = time.monotonic()
            due = now - self._synced >= _SYNC_SECONDS
            self._write(self._path, "".join(lines).encode(), sync=due)
            self._synced = now if due else self._synced
        self.rows.append(row)

    def _aligned(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns a row with all columns in their order, which those of the rows before have then, too."""
        if not self.rows or list(row) == list(self.rows[0]):
            return row
        names = list(self.rows[0])
        new = [name for name in row if name not in names]
        if new:
            before = self._text()
            place = next((index for index, name in enumerate(names) if name in NO_METRICS[1:]), len(names))
            names[place:place] = new
            self.rows = [{name: known.get(name, math.nan) for name in names} for known in self.rows]
            if self._path is not None:
                self.guard()
                self._bring_back(self._path, sync=False, quiet=lambda there, _: there == before)
        return {name: row.get(name, math.nan) for name in names}

    def sync(self) -> None:
        """Returns once all rows are on the disk."""
        if self._path is not None and self.rows:
            self._write(self._path, b"", sync=True)

    def _write(self, path: Path, data: bytes, *, sync: bool) -> None:
        """Appends to the file, which is brought back first where it is not as it was left."""
        self.guard()
        try:
            self._append(path, data, sync=sync)
        except OSError:
            self.guard()  # the folder may have gone this moment
            raise

    def _append(self, path: Path, data: bytes, *, sync: bool) -> None:
        descriptor = self._opened(path)
        if descriptor is None:
            self._bring_back(path, sync=False, quiet=lambda there, text: there == text)
            descriptor = self._opened(path)
        if descriptor is None:
            raise OSError(f"{path}: another process is writing to this file.")
        try:
            append_whole(descriptor, data, path, sync=sync)
            self._mark = _mark(descriptor)
        finally:
            os.close(descriptor)

    def _opened(self, path: Path) -> int | None:
        """Opens the file where it is as it was left."""
        new = os.O_CREAT | os.O_EXCL if self._mark is None else 0
        try:
            descriptor = open_below(path.parent, path.name, os.O_WRONLY | os.O_APPEND | new)
        except OSError as error:
            if error.errno in _NOT_THE_FILE and path.parent.is_dir():
                return None
            raise
        if self._mark in (None, _mark(descriptor)):
            return descriptor
        os.close(descriptor)
        return None

    def _bring_back(self, path: Path, *, sync: bool, quiet: Callable[[str, str], bool]) -> None:
        """Has the file hold the rows so far and nothing else.

        Args:
            path: the file.
            sync: whether it is on the disk then.
            quiet: whether nothing is lost with what the file has (its text, and that of the rows).
        """
        folder, name, text = path.parent, path.name, self._text()
        data: bytes | None = None
        if os.path.lexists(path):
            try:
                data = read_below(folder, name)
                known = quiet(normal_text(data), text)
            except OSError as error:
                if error.errno not in (*_NOT_THE_FILE, errno.EACCES, errno.EFBIG):
                    raise
                known = False
            if not known:
                aside = aside_name(folder, name)
                (folder / name).rename(folder / aside)
                logger.warning(
                    "%s was modified: it is now %s, and the run's rows are rewritten",
                    path,
                    aside,
                )
        elif self._mark is not None:
            logger.warning("%s was removed: the run's rows are rewritten", path)
        if data != text.encode():
            write_below(folder, name, text, sync=sync)
        descriptor = open_below(folder, name, os.O_RDONLY)
        self._mark = _mark(descriptor)
        os.close(descriptor)

    def _text(self) -> str:
        rows = self.rows
        return "".join(map(line_of, ([rows[0].keys()] if rows else []) + [row.values() for row in rows]))

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
    for column in watched(monitor):
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
        table = read_table(file)
    except OSError as error:
        raise UsageError(f"{file}: cannot read the history: {error.strerror}.") from None
    if table.faults:
        logger.warning("%s was modified: %s", file, "; ".join(table.faults))
    if not table.rows:
        raise UsageError(f"{file}: the history has no complete row yet.")
    # pandas' own reader rounds the last digit of some numbers.
    frame: pd.DataFrame = pd.DataFrame([map(value_of, row) for row in table.rows], columns=table.columns)
    return frame


def history_file(path: Path) -> Path:
    """Returns the history's file of a run's folder, or the file itself, where one is named."""
    return path / HISTORY if path.is_dir() else path


def read_table(file: Path) -> Table:
    """Reads a history as it is written, without pandas.

    Args:
        file: the CSV file; no link, unless a person named it.

    Returns:
        its columns, and the cells of each whole row; a line without its end is left out.

    Raises:
        OSError: the file cannot be read.
    """
    return parse_table(read_below(file.parent, file.name))


def number_of(cell: str) -> float | None:
    """Returns the number that a history's cell holds, None where it holds none; one without bounds is infinite."""
    value = value_of(cell)
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


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


def _mark(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size


def _is_known(there: str, text: str) -> bool:
    """Whether a file has nothing that the rows do not hold, but rows of later epochs, or one that a kill has cut.

    Columns are compared by their names: one that came with a later epoch is NaN in the rows before.
    """
    if text.startswith(there):
        return True
    found, held = parse_table(there.encode()), parse_table(text.encode())
    later = len(found.rows) - len(held.rows)
    if found.faults or len(set(found.columns)) != len(found.columns):
        return False
    if (held.columns and found.columns[:1] != held.columns[:1]) or (later < 0 and not there.endswith("\n")):
        return False  # nothing that dtrain leaves
    for cells, known in zip(found.rows, held.rows, strict=False):
        row = dict(zip(held.columns, known, strict=True))
        if any(cell != row.get(name, _NAN) for name, cell in zip(found.columns, cells, strict=True)):
            return False
    lines = [line for line in there.split("\n")[:-1] if line.strip("\0")]
    return all(is_row(line, len(found.columns)) for line in lines[len(lines) - max(later, 0) :])
