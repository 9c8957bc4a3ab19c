"""A run as its folder tells of it: rows, config, starts and failures.

What is torn or missing is left out; what is damaged is named, and costs neither the rest of the run nor another run.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from dtrain.config.bounded import MOST_BYTES, load_plain
from dtrain.errors import UsageError
from dtrain.files import read_below, read_text_below, what_is
from dtrain.layout import CHECKPOINTS, CONFIG, FAILURE, JOB, OWNER, SLURM, STARTS, checkpoints_in
from dtrain.report.finding import RunLocation
from dtrain.rundir.cells import Table
from dtrain.rundir.claims import living_owner
from dtrain.rundir.columns import EPOCH, SECONDS, Mode, mode_of, monitored, watched
from dtrain.rundir.history import number_of, read_table
from dtrain.rundir.job_record import read_record
from dtrain.rundir.starts import MOST_COUNTED, RunStart, count_of, parse_starts

RUNNING, KILLED, COMPLETE, FAILED, STOPPED = "running", "killed", "complete", "failed", "stopped"
DAMAGED = "damaged"
_MOST_FAILURE = 8 << 20  # bytes

T = TypeVar("T")


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
        damage: what of the folder cannot be read or is not as dtrain writes it, each with its file and the cause.
    """

    name: str
    folder: Path
    columns: tuple[str, ...] = ()
    cells: tuple[tuple[str, ...], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[RunStart, ...] = ()
    failures: tuple[Mapping[str, Any], ...] = ()
    job: Mapping[str, Any] | None = None
    owner: str = ""
    damage: tuple[str, ...] = ()

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in reversed(list(enumerate(self.columns)))}

    def has(self, column: str) -> bool:
        """Whether its history has a column."""
        return column in self._index

    def texts(self, column: str) -> list[str]:
        """Returns a column's cells as they are written; no such column is an empty one."""
        index = self._index.get(column)
        if index is None:
            return [""] * len(self.cells)
        return [row[index] for row in self.cells]

    def numbers(self, column: str) -> list[float | None]:
        """Returns a column's numbers; None where there is none."""
        return [number_of(cell) for cell in self.texts(column)]

    @cached_property
    def epochs(self) -> list[int]:
        """The rows' epochs; where the history does not say, they are counted."""
        found = self.numbers(EPOCH)
        whole = [int(value) for value in found if value is not None and abs(value) < MOST_COUNTED]
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
        return count_of(_at(self.config, "train", "epochs"))

    @cached_property
    def state(self) -> str:
        """In a word: running, damaged, complete, stopped, failed, killed; else "no rows" or "ended"."""
        if self.owner:
            return RUNNING
        if self.damage:
            return DAMAGED
        last = self.starts[-1] if self.starts else None
        failed = bool(self.failures) and (last is None or self.failures[-1]["at"] >= last.at)
        if last is not None:
            return last.why or (FAILED if failed else KILLED)
        if self.planned is not None and self.epoch >= self.planned:
            return COMPLETE
        return FAILED if failed else "ended" if self.cells else "no rows"

    @cached_property
    def left_nothing(self) -> bool:
        """Whether it ended before its first epoch, and there is no checkpoint within it from which it would resume."""
        if self.state not in (FAILED, KILLED, STOPPED) or self.cells:
            return False
        folder = self.folder / CHECKPOINTS
        return not folder.is_symlink() and not checkpoints_in(folder)

    def monitor(self, metric: str | None = None) -> tuple[str | None, Mode]:
        """Returns the column that says which epoch is best, and which end of it is.

        Args:
            metric: the one that a person asked for; else the config's `checkpoint.monitor`, else val_loss, else loss.
        """
        own, mode = _at(self.config, "checkpoint", "monitor"), _at(self.config, "checkpoint", "mode")
        own = own if isinstance(own, str) else None
        name = metric or (own if own in self.columns else monitored(self.columns))
        usual = own is None and metric is None and name in watched(None)
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


def read_run(place: RunLocation) -> Run:
    """Reads a run; a file that is missing counts as not there, and so does a damaged one, which is named besides."""
    folder = place.folder
    damage: list[str] = []
    table = _read(damage, place.history.name, lambda: read_table(place.history)) or Table()
    damage += [f"{place.history.name}: {fault}" for fault in table.faults]
    config = _read(damage, CONFIG, lambda: _config(folder))
    starts, fault = parse_starts(folder)
    damage += [f"{STARTS}: {fault}"] if fault else []
    job = _read(damage, f"{SLURM}/{JOB}", lambda: _job(folder))
    owner = living_owner(folder)
    damage += [f"{OWNER}: {what_is(folder / OWNER)}"] if what_is(folder / OWNER) else []
    return Run(
        place.name,
        folder,
        tuple(table.columns),
        tuple(map(tuple, table.rows)),
        config or {},
        tuple(starts),
        tuple(_failures(folder, damage)),
        job,
        "" if owner is None else str(owner),
        tuple(damage),
    )


def _read(damage: list[str], name: str, read: Callable[[], T]) -> T | None:
    """Reads a file; notes why that failed, where the file is there."""
    try:
        return read()
    except FileNotFoundError:
        return None
    except OSError as error:
        damage.append(f"{name}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        damage.append(f"{name}: it is not UTF-8 text (byte {error.start})")
    except RecursionError:
        damage.append(f"{name}: it is nested too deeply")
    except (ValueError, UsageError) as error:
        damage.append(f"{name}: {str(error).partition(chr(10))[0]}")
    return None


def _at(nested: Any, *keys: str) -> Any:
    for key in keys:
        nested = nested.get(key) if isinstance(nested, Mapping) else None
    return nested


def _config(folder: Path) -> Mapping[str, Any]:
    found = load_plain(read_text_below(folder, CONFIG, MOST_BYTES))
    if not isinstance(found, dict | None):
        raise ValueError("it is not a mapping of sections")
    return found or {}


def _failures(folder: Path, damage: list[str]) -> list[Mapping[str, Any]]:
    found = []
    stem, _, suffix = FAILURE.partition(".")
    for path in (*sorted(folder.glob(f"{stem}-*.{suffix}")), folder / FAILURE):
        told = _read(damage, path.name, lambda path=path: json.loads(read_below(folder, path.name, _MOST_FAILURE)))  # type: ignore[misc]
        with contextlib.suppress(OSError):
            if isinstance(told, dict):
                found.append({**told, "at": path.lstat().st_mtime, "file": path.name})
            elif told is not None:
                damage.append(f"{path.name}: it contains no failure report")
    return sorted(found, key=lambda one: float(one["at"]))


def _job(folder: Path) -> Mapping[str, Any] | None:
    record = read_record(folder)
    return None if record is None else asdict(record)
