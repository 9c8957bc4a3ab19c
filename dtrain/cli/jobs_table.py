"""The table of `dtrain jobs`, for a terminal, for a pipe, and for programs."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dtrain.launch.retries import progress
from dtrain.report.progress import RunProgress, read_progress
from dtrain.report.words import printable
from dtrain.slurm.runs import RunJob
from dtrain.wording import number

COLUMNS = ("JOB", "STATE", "RUN", "EPOCH", "LEFT", "REQUEUED", "LATEST")
_LEFT_OUT = ("LEFT", "REQUEUED")  # of a terminal's table, where there is nothing in them
_STYLES = {"RUNNING": "green", "PENDING": "yellow", "COMPLETED": "dim"}
_TROUBLE = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True)
class Row:
    """A run's job, with how far the run is.

    Attributes:
        one: run and job.
        progress: of the run.
        starts: how often it was started.
        attempts_without_progress: how many of the finished starts made neither a row nor a checkpoint.
    """

    one: RunJob
    progress: RunProgress
    starts: int
    attempts_without_progress: int

    @property
    def requeued(self) -> int:
        """How often it was started again."""
        job = self.one.job
        return max(self.starts - 1, (job.restarts or 0) if job is not None else 0, 0)

    def cells(self) -> tuple[str, ...]:
        """Returns what the table's columns hold."""
        job, done = self.one.job, self.progress
        epoch = f"{done.epoch}/{done.epochs}" if done.epochs is not None else str(done.epoch or "-")
        attempts_without_progress = (
            f" ({self.attempts_without_progress} without progress)" if self.attempts_without_progress else ""
        )
        left = duration(job.time_left) if job is not None and job.runs and job.time_left is not None else "-"
        name = printable(self.one.name)
        return (
            self.one.id or "-",
            self.one.state,
            name,
            epoch,
            left,
            f"{self.requeued or '-'}{attempts_without_progress}",
            self.latest(),
        )

    def latest(self) -> str:
        """Returns why the job waits or how it ended, and the last metrics."""
        metrics = " ".join(f"{name} {number(value)}" for name, value in self.progress.metrics.items())
        why = f"{'waits: ' if self.one.job is not None and self.one.job.waits and self.one.why else ''}{self.one.why}"
        return printable("; ".join(part for part in (why, metrics) if part)) or "-"

    def plain(self) -> dict[str, Any]:
        """Returns all of it for programs; times in seconds, moments in seconds since the epoch."""
        one, job = self.one, self.one.job
        return {
            "job": one.id or None,
            "state": one.state,
            "told_by": job.source if job is not None else "folder",
            "reason": (job.reason if job is not None and job.waits else one.why) or None,
            "name": one.name,
            "run": str(one.run) if one.run is not None else None,
            "epoch": self.progress.epoch,
            "epochs": self.progress.epochs,
            "row": {name: _finite(value) for name, value in self.progress.row.items()},
            "seconds_left": job.time_left if job is not None and job.runs else None,
            "nodes": (job.nodes if job is not None else "") or None,
            "starts": self.starts,
            "requeued": self.requeued,
            "in_vain": self.attempts_without_progress,
            "ended": one.ended if one.is_over else None,
            "exit_code": job.code if job is not None and one.is_over else None,
        }


def row_of(one: RunJob) -> Row:
    """Reads how far a run is."""
    if one.run is None:
        return Row(one, RunProgress(), 0, 0)
    began = [each.progress for each in one.record.incarnations] if one.record is not None else []
    # Where each one ended, the next one began; the last one may still get somewhere.
    ends = [*began[1:], progress(one.run)] if one.is_over or (one.job is not None and one.job.waits) else began[1:]
    return Row(one, read_progress(one.run), len(began), sum(a == b for a, b in zip(began, ends, strict=False)))


def as_json(rows: Sequence[Row]) -> str:
    """Returns the rows for programs."""
    return json.dumps([row.plain() for row in rows], indent=1)


def as_text(rows: Sequence[Row]) -> str:
    """Returns the rows in columns of equal width, a line each: for pipes and files."""
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    padded = (
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def as_table(rows: Sequence[Row], width: int) -> str:
    """Returns the rows as a table that fits a terminal, with colours.

    Args:
        rows: what to show.
        width: of the terminal, in characters.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    lines = [row.cells() for row in rows]
    shown = [i for i, name in enumerate(COLUMNS) if name not in _LEFT_OUT or any(cells[i] != "-" for cells in lines)]
    for name in [COLUMNS[i] for i in shown]:
        # These two may take several lines; the rest is of no use in pieces.
        table.add_column(name, no_wrap=name not in ("RUN", "LATEST"), overflow="fold")
    for row, cells in zip(rows, lines, strict=True):
        texts = [Text(cells[i]) for i in shown]
        texts[1].stylize(_STYLES.get(row.one.state, "red" if row.one.state in _TROUBLE else ""))
        table.add_row(*texts)
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, highlight=False).print(table)
    return out.getvalue().rstrip("\n")


def duration(seconds: float) -> str:
    """Returns "1-02:03:04", as SLURM writes it."""
    days, rest = divmod(int(seconds), 86400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days}-{clock}" if days else clock


def _finite(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return value if value is None or abs(value) < float("inf") else str(value)
