"""How far a run is, from its folder alone, without torch and pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dtrain.columns import VALID, metrics_of
from dtrain.config.saved import CONFIG
from dtrain.history import FILE_NAME, read_cells, value_of


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
    row = _last_row(run / FILE_NAME)
    return RunProgress(int(row.get("epoch") or 0), _epochs(run / CONFIG), row)


def _last_row(path: Path) -> dict[str, float | None]:
    try:
        columns, rows = read_cells(path)
    except OSError:
        return {}
    values = zip(columns, map(value_of, rows[-1] if rows else ()), strict=False)
    return {name: float(value) if isinstance(value, (int, float)) else None for name, value in values}


def _epochs(path: Path) -> int | None:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["epochs"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return found if isinstance(found, int) else None
