"""How far a run is, from its folder alone, without torch and pandas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.config.bounded import MOST_BYTES, load_plain
from dtrain.files import read_text_below
from dtrain.layout import CONFIG, HISTORY
from dtrain.rundir.columns import VALID, metrics_of
from dtrain.rundir.history import number_of, read_table


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes:
        epoch: how many epochs are done.
        epochs: how many there are to be; None where that is not known.
        row: the history's last whole row: column -> value, None where it is empty.
    """

    epoch: int = 0
    epochs: int | None = None
    row: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs is not None and self.epoch >= self.epochs

    @property
    def metrics(self) -> dict[str, float]:
        """The last epoch's means: those of the validation, or of the training where there is none."""
        all_of_them = {name: x for name in metrics_of(self.row) if (x := self.row[name]) is not None}
        return {name: x for name, x in all_of_them.items() if name.startswith(VALID)} or all_of_them


def read_progress(run: Path) -> RunProgress:
    """Reads how far a run is; what is not there, or not readable, is not known."""
    row = _last_row(run / HISTORY)
    epoch = row.get("epoch") or 0
    return RunProgress(int(epoch) if math.isfinite(epoch) else 0, _epochs(run / CONFIG), row)


def _last_row(path: Path) -> dict[str, float | None]:
    try:
        table = read_table(path)
    except OSError:
        return {}
    values = zip(table.columns, map(number_of, table.rows[-1] if table.rows else ()), strict=False)
    return dict(values)


def _epochs(path: Path) -> int | None:
    try:
        found = load_plain(read_text_below(path.parent, path.name, MOST_BYTES))["train"]["epochs"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) else None
