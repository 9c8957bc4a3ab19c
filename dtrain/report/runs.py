"""A run as its folder tells of it: rows, config, starts and failures. What is torn or missing is left out."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dtrain.columns import EPOCH, SECONDS, Mode, mode_of, monitored
from dtrain.config.saved import CONFIG
from dtrain.errors import UsageError
from dtrain.history import read_cells, value_of
from dtrain.launch.postmortem import FILE_NAME as FAILURE
from dtrain.lock import living_owner
from dtrain.report.finding import Place
from dtrain.slurm.record import read_record
from dtrain.starts import Start, read_starts

RUNNING, KILLED, COMPLETE, FAILED, STOPPED = "running", "killed", "complete", "failed", "stopped"


@dataclass(frozen=True)
class Run:
    """A run, read once.

    Attributes:
        name: what to call it.
        folder: its folder.
        columns: those of its history; empty as long as there is none.
        cells: its rows, as they are written.
        config: the resolved config, nested; empty where there is none.
        starts: the times that it was started.
        failures: what the files failure*.json hold, each with `at`, seconds since the epoch, and `file`; the latest
            comes last.
        job: what slurm/job.json holds, or None.
        owner: who has the folder now, in words; empty where nobody does.
    """

    name: str
    folder: Path
    columns: tuple[str, ...] = ()
    cells: tuple[tuple[str, ...], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[Start, ...] = ()
    failures: tuple[Mapping[str, Any], ...] = ()
    job: Mapping[str, Any] | None = None
    owner: str = ""

    def texts(self, column: str) -> list[str]:
        """Returns a column's cells as they are written; no such column is an empty one."""
        if column not in self.columns:
            return [""] * len(self.cells)
        index = self.columns.index(column)
        return [row[index] for row in self.cells]

    def numbers(self, column: str) -> list[float | None]:
        """Returns a column's numbers; None where there is none."""
        cells = self.texts(column)
        return [float(cell) if isinstance(value_of(cell), int | float) else None for cell in cells]

    @cached_property
    def epochs(self) -> list[int]:
        """The rows' epochs; where the history does not say, they are counted."""
        found = self.numbers(EPOCH)
        whole = [int(value) for value in found if value is not None and math.isfinite(value)]
        return whole if len(whole) == len(found) else list(range(1, len(found) + 1))

    @cached_property
    def seconds(self) -> list[float] | None:
        """How long training took until the end of each row; None where some row does not say."""
        found = self.numbers(SECONDS)
        total, sums = 0.0, []
        for value in found:
            total += math.nan if value is None else value
            if not math.isfinite(total):
                return None
            sums.append(total)
        return sums

    @property
    def epoch(self) -> int:
        """The last whole epoch."""
        return self.epochs[-1] if self.epochs else 0

    @property
    def planned(self) -> int | None:
        """How many epochs there are to be; None where that is not known."""
        found = _at(self.config, "train", "epochs")
        return found if isinstance(found, int) else None

    @cached_property
    def state(self) -> str:
        """In a word: running, complete, stopped, failed, killed; "no rows" or "ended" where nothing more is known."""
        if self.owner:
            return RUNNING
        last = self.starts[-1] if self.starts else None
        failed = bool(self.failures) and (last is None or self.failures[-1]["at"] >= last.at)
        if last is not None:
            return last.why or (FAILED if failed else KILLED)
        if self.planned is not None and self.epoch >= self.planned:
            return COMPLETE
        return FAILED if failed else "ended" if self.cells else "no rows"

    def monitor(self, metric: str | None = None) -> tuple[str | None, Mode]:
        """Returns the column that says which epoch is best, and which end of it is.

        Args:
            metric: the one that a person asked for; else the config's `checkpoint.monitor`, else val_loss, else loss.
        """
        own, mode = _at(self.config, "checkpoint", "monitor"), _at(self.config, "checkpoint", "mode")
        name = metric or (own if own in self.columns else monitored(self.columns))
        usual = own is None and metric is None and name in ("val_loss", "loss")
        if name is not None and (name == own or usual) and mode in ("min", "max"):
            return name, mode
        return name, "min" if name is None else mode_of(name)

    def best(self, metric: str | None = None, mode: Mode | None = None) -> int | None:
        """Returns the index of the first row with the best value; None where no value is a finite number."""
        name, own_mode = self.monitor(metric)
        if name is None:
            return None
        sign = 1.0 if (mode or own_mode) == "min" else -1.0
        usable = [(sign * x, i) for i, x in enumerate(self.numbers(name)) if x is not None and math.isfinite(x)]
        return min(usable)[1] if usable else None

    def resumed_after(self) -> list[int]:
        """Returns the epochs after which the run was started again."""
        return [start.before for start in self.starts[1:]]


def read_run(place: Place) -> Run:
    """Reads a run; a file that is missing, torn or not what it should be counts as not there."""
    columns: list[str] = []
    rows: list[list[str]] = []
    with contextlib.suppress(OSError):
        columns, rows = read_cells(place.history)
    folder = place.folder
    owner = living_owner(folder)
    return Run(
        place.name,
        folder,
        tuple(columns),
        tuple(map(tuple, rows)),
        _config(folder),
        tuple(read_starts(folder)),
        tuple(_failures(folder)),
        _job(folder),
        "" if owner is None else str(owner),
    )


def _at(nested: Any, *keys: str) -> Any:
    for key in keys:
        nested = nested.get(key) if isinstance(nested, Mapping) else None
    return nested


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        found = yaml.load((folder / CONFIG).read_text(encoding="utf-8"), _LOADER)  # noqa: S506 - both are safe loaders
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast


def _failures(folder: Path) -> list[Mapping[str, Any]]:
    found = []
    stem, _, suffix = FAILURE.partition(".")
    for path in (*folder.glob(f"{stem}-*.{suffix}"), folder / FAILURE):
        try:
            told, at = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
        except (OSError, ValueError):
            continue
        if isinstance(told, dict):
            found.append({**told, "at": at, "file": path.name})
    return sorted(found, key=lambda one: float(one["at"]))


def _job(folder: Path) -> Mapping[str, Any] | None:
    try:
        record = read_record(folder)
    except (OSError, UsageError):
        return None
    return None if record is None else asdict(record)
