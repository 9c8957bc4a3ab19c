"""What a loss's graph showed for one number of samples, to be compared with what it shows for another one."""

from __future__ import annotations

import math
from collections.abc import Hashable

_EXACT = 1e-9


class LossMemory:
    """The numbers at places of the graphs of a step's losses."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, dict[int, float]] = {}
        self._loss = self._rows = 0

    def begin(self, rows: int) -> None:
        """A loss of so many samples is looked at: a step may have several."""
        self._loss, self._rows = self._loss + 1 if rows == self._rows else 0, rows

    def follows(self, what: str, place: int, value: float) -> bool:
        """Keeps a number, and says whether it was as many times the samples where there was another number of them.

        Args:
            what: is numbered.
            place: in the graph, told by what leads there from the loss.
            value: the number.
        """
        rows, others = self._rows, self._others(what, place, value)
        follows = any(math.isclose(value * other, there * rows, rel_tol=_EXACT) for other, there in others)
        return follows and value != 0

    def stays(self, what: str, place: int, value: float) -> bool:
        """Keeps a number, and says whether it was the same where there was another number of samples."""
        return any(there == value for _, there in self._others(what, place, value))

    def _others(self, what: str, place: int, value: float) -> list[tuple[int, float]]:
        seen = self._seen.setdefault((what, self._loss, place), {})
        seen.setdefault(self._rows, value)
        return [(rows, there) for rows, there in seen.items() if rows != self._rows]
