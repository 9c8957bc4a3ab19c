"""The cells of a history's file as they are written, whatever has been done to the file since."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_BOM = b"\xef\xbb\xbf"
_MOST_HEAD_LINES = 10  # of a head whose names hold line ends, as older versions wrote them
_QUOTED = re.compile('"[^"]*"')
_MOST_FAULTS = 3  # that are named
_MOST_COLUMNS = 50_000  # further ones are left out: a table of a million would keep those who look at it waiting


@dataclass
class Table:
    """A history's file.

    Attributes:
        columns: their names.
        rows: as many cells in each, for each whole line.
        faults: what is wrong with the file, in words; empty where it is as dtrain writes it.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def parse_table(data: bytes) -> Table:
    """Reads a table line by line, so that a line that is damaged costs no other.

    What programs do to such a file is undone: a byte order mark, line ends of other systems, semicolons in place of
    commas. A last line without its end, which a kill may leave, is left out.

    Args:
        data: the file's bytes.
    """
    table = Table()
    lines = _lines(data, table.faults)
    if not lines:
        return table
    first, number = lines[0], 1
    while first.count('"') % 2 and number < min(len(lines), _MOST_HEAD_LINES):
        first, number = f"{first}\n{lines[number]}", number + 1
    bare = _QUOTED.sub("", first)
    separator = ";" if ";" in bare and "," not in bare else ","
    if separator == ";":
        table.faults.append("its cells are separated by semicolons")
    table.columns = _cells(first, separator) or []
    width, faults = len(table.columns), list[str]()
    for index, line in enumerate(lines[number:], number + 1):
        if not line:
            continue
        cells = _cells(line, separator)
        if cells is None:
            faults.append(f"line {index} cannot be read")
            continue
        if line.count('"') % 2:
            faults.append(f"line {index} has a quote that is not closed")
        elif len(cells) > width:
            faults.append(f"line {index} has {len(cells)} cells for {width} columns")
        table.rows.append([*cells, *[""] * (width - len(cells))][:width])
    table.faults += faults[:_MOST_FAULTS]
    if len(faults) > _MOST_FAULTS:
        table.faults.append(f"{len(faults) - _MOST_FAULTS} more damaged lines")
    _leave_out_columns(table)
    return table


def _leave_out_columns(table: Table) -> None:
    if len(table.columns) > _MOST_COLUMNS:
        table.faults.append(f"it has {len(table.columns):,} columns, of which {_MOST_COLUMNS:,} are shown")
        for cells in (table.columns, *table.rows):
            del cells[_MOST_COLUMNS:]


def normal_text(data: bytes) -> str:
    """Returns a file's text without what other programs add to each line or the beginning."""
    return data.removeprefix(_BOM).decode("utf-8", "replace").replace("\r\n", "\n")


def line_of(cells: Iterable[Any]) -> str:
    """Returns a row as a line of the file."""
    buffer, texts = io.StringIO(), list(cells)
    # A sole column's name with a semicolon would be taken for names that a spreadsheet has separated by it.
    sole = len(texts) == 1 and ";" in str(texts[0])
    csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL if sole else csv.QUOTE_MINIMAL).writerow(texts)
    return buffer.getvalue()


def is_row(line: str, width: int) -> bool:
    """Whether a line is a row as dtrain writes it: a count first, and numbers after it."""
    cells = line.split(",")
    return len(cells) == width and cells[0].isdecimal() and all(not cell or _is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _lines(data: bytes, faults: list[str]) -> list[str]:
    data = data.removeprefix(_BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.append(f"line {line} has bytes that are not UTF-8")
        text = data.decode("utf-8", "replace")
    text = text.replace("\0", "")  # which a power cut may leave
    if "\n" not in text and text.count("\r") > 1:
        text = text.replace("\r", "\n")
    return [line.removesuffix("\r") for line in text[: text.rfind("\n") + 1].split("\n")[:-1]]


def _cells(line: str, separator: str) -> list[str] | None:
    """Returns a line's cells; of one with an open quote those that it has without quotes; None where that fails."""
    if '"' not in line:
        return line.split(separator)
    if line.count('"') % 2:
        return line.replace('"', "").split(separator)
    try:
        return next(csv.reader([line] if "\n" not in line else line.splitlines(keepends=True), delimiter=separator))
    except (csv.Error, StopIteration):  # a cell of more than 128 KiB
        return None
