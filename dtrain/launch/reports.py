"""How a rank tells its supervisor how it ended: one small JSON file a rank, also when all went well."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPORT_DIR = "DTRAIN_REPORT_DIR"
_RUN = "run.txt"

PEER = "peer"  # a rank's connection to another was cut: the echo of that one's end


@dataclass(frozen=True)
class Told:
    """What an exception tells, for programs to read.

    Attributes:
        cause: exception, out_of_memory, nan, exit, or `PEER`.
        type: the exception's class.
        message: its text.
        traceback: the user's own frames; those of dtrain, Accelerate and torch are folded away.
    """

    cause: str
    type: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Report:
    """How one rank ended, in words.

    Attributes:
        rank: who.
        exit_code: what the job shall end with.
        text: what a person shall read; empty where all went well.
        when: seconds since the epoch; the earliest report is the cause, later ones are its echo.
        told: the same, in parts; None where no exception ended the rank.
        alone: whether it seems to have trained without joining the other ranks.
    """

    rank: int
    exit_code: int
    text: str
    when: float
    told: Told | None = None
    alone: bool = False

    @property
    def echo(self) -> bool:
        """Whether it tells of nothing but another rank's end."""
        return self.told is not None and self.told.cause == PEER


def supervised() -> bool:
    """Whether a dtrain supervisor prints this rank's report."""
    return REPORT_DIR in os.environ


def write_report(rank: int, exit_code: int, text: str, told: Told | None = None, *, alone: bool = False) -> None:
    """Leaves a report for the supervisor; whole or not at all."""
    path = Path(os.environ[REPORT_DIR]) / f"rank-{rank}.json"
    write_whole(path, json.dumps(asdict(Report(rank, exit_code, text, time.time(), told, alone))))


def words_on_alone(reports: Sequence[Report], size: int) -> str:
    """Returns a warning where several ranks have each trained alone, which nothing else would show; else nothing.

    Args:
        reports: of ranks that ended well.
        size: number of ranks in the job.
    """
    if size == 1 or not reports or not all(report.alone for report in reports):
        return ""
    return (
        f"dtrain: warning: {size} processes each ran the whole script alone: none joined the others. To have them "
        "train together, call dtrain.prepare(...) before the loop over the batches (docs/script-style.md)."
    )


def read_reports(folder: Path) -> list[Report]:
    """Returns the reports that ranks left, the earliest first."""
    reports = [_read(path) for path in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda report: report.when)


def _read(path: Path) -> Report:
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    told = fields.pop("told")
    return Report(**fields, told=None if told is None else Told(**told))


def name_run(folder: Path) -> None:
    """Tells the supervisor, if there is one, which folder is the run's, so that it can leave word there."""
    if supervised():
        write_whole(Path(os.environ[REPORT_DIR]) / _RUN, str(folder.resolve()))


def named_run(reports: Path) -> Path | None:
    """Returns the run's folder, None where no rank has named one."""
    try:
        return Path((reports / _RUN).read_text(encoding="utf-8"))
    except OSError:
        return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = part_of(path)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:  # a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def part_of(path: Path) -> Path:
    """Returns the name under which `write_whole` writes a file, before it has its own."""
    return path.with_name(f".{path.name}.part")
