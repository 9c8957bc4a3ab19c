"""The rows of a history in a checkpoint: a line of JSON each, encoded once and not again at each save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dtrain.errors import CheckpointError

Row = dict[str, Any]


class RowLines:
    """Rows as lines; of a list that only grows, those that are new are encoded alone."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._count = 0
        self._last: Row | None = None

    def of(self, rows: Sequence[Row]) -> bytes:
        """Returns all rows as lines."""
        known = self._count <= len(rows) and (self._count == 0 or rows[self._count - 1] is self._last)
        if not known:
            self._text, self._count = bytearray(), 0
        for row in rows[self._count :]:
            self._text += json.dumps(row, default=_plain).encode() + b"\n"
        self._count, self._last = len(rows), rows[-1] if rows else None
        return bytes(self._text)


def read_rows(lines: bytes) -> list[Row]:
    """Returns the rows that `RowLines` wrote.

    Raises:
        CheckpointError: a line is none.
    """
    try:
        rows = [json.loads(line) for line in lines.splitlines()]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"a checkpoint has an invalid row: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise CheckpointError("a checkpoint has an invalid row")
    return rows


def _plain(value: Any) -> Any:
    """A number of NumPy's or torch's as one of Python's."""
    return value.item()
