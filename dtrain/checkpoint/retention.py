"""Which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.checkpoint.folder import Saved, all_saved, remove
from dtrain.rundir.columns import Mode, check_monitor, mode_of, watched


@dataclass(frozen=True)
class RetentionPolicy:
    """What is kept.

    Attributes:
        last: so many of the last ones, at least 1; and the last one of an epoch's end.
        best: so many of the best ones among those of an epoch's end.
        monitor: the history's column that says what is best; None for `val_loss`, else `loss`.
        mode: whether its lowest or its highest value is best; None for what its name says.
    """

    last: int = 1
    best: int = 1
    monitor: str | None = None
    mode: Mode | None = None

    def ranked(self, saved: list[Saved]) -> list[Saved]:
        """Returns the checkpoints that have a value of the monitor, the best first; of equal ones, the earlier."""
        ends = [one for one in saved if one.row is not None]
        for column in watched(self.monitor):
            having = [one for one in ends if _number((one.row or {}).get(column))]
            if having:
                sign = 1 if (self.mode or mode_of(column)) == "min" else -1
                return sorted(having, key=lambda one: sign * (one.row or {})[column])
        return []

    def prune(self, folder: Path, own: Collection[Path] | None = None) -> None:
        """Removes what is not kept; call it after a new one has its name.

        Args:
            folder: of the checkpoints.
            own: the only ones that are looked at, others stay; None where the whole folder is one run's.
        """
        for one in self.beyond([one for one in all_saved(folder) if own is None or one.path in own]):
            remove(one.path)

    def beyond(self, saved: list[Saved]) -> list[Saved]:
        """Returns those of a run's checkpoints that are not kept."""
        ends = [one for one in saved if one.step is None]
        kept = {one.path for one in (*saved[-self.last :], *ends[-1:], *self.ranked(saved)[: self.best])}
        return [one for one in saved if one.path not in kept]

    def chosen(self, folder: Path, which: Literal["best", "last"]) -> Saved | None:
        """Returns the best or the last checkpoint of an epoch's end; None where there is none."""
        saved = all_saved(folder)
        ends = [one for one in saved if one.step is None]
        return next(iter(self.ranked(saved) if which == "best" else ends[-1:]), None)

    def check(self, row: dict[str, Any], *, may_lack: bool = False) -> bool:
        """Compares the monitor with a row of the history.

        Args:
            row: it has all columns that are known.
            may_lack: whether a hook may add the column later.

        Returns:
            whether it is there.

        Raises:
            UsageError: no such column in the history.
        """
        return check_monitor(self.monitor, row, "checkpoint.monitor", may_lack=may_lack)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)
