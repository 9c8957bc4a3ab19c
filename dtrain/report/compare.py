"""Runs side by side, by one metric: at the end, at their best, at the same epoch, after the same training time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.errors import UsageError, nearest
from dtrain.report.runs import Run
from dtrain.rundir.columns import Mode, metrics_of
from dtrain.rundir.history import value_of


@dataclass(frozen=True)
class Point:
    """A value of the metric.

    Attributes:
        epoch: whose.
        cell: as the history has it.
        seconds: how long training had taken by then; None where the history does not say.
    """

    epoch: int
    cell: str
    seconds: float | None


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs; None where it has no such value.

    Attributes:
        run: which.
        final: of its last epoch.
        best: of its best epoch.
        at_epoch: of the last epoch that all runs have.
        at_time: of its last epoch that ended within the time that all runs trained.
    """

    run: Run
    final: Point | None
    best: Point | None
    at_epoch: Point | None
    at_time: Point | None


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        metric: the column; None where no run has a metric.
        mode: which end of it is best.
        epoch: the last one that all runs have; None where they have none in common.
        seconds: the training time that all runs have had; None where some run does not say.
        runs: in the order given.
    """

    metric: str | None
    mode: Mode
    epoch: int | None
    seconds: float | None
    runs: tuple[ComparedRun, ...]


def compare(runs: Sequence[Run], metric: str | None = None, mode: Mode | None = None) -> Comparison:
    """Compares runs; those without a row are there, and have no say.

    Args:
        runs: at least one.
        metric: a column that some run has; by default that by which the first run with rows says what is best.
        mode: which end of it is best; by default as that run's config says, else by the metric's name.

    Raises:
        UsageError: no run has such a column.
    """
    usable = [run for run in runs if run.cells]
    check_metric(metric, usable or list(runs))
    leader = next((run for run in usable if metric is None or metric in run.columns), None)
    name, own_mode = leader.monitor(metric) if leader is not None else (metric, "min")
    mode = mode or own_mode
    shared = set.intersection(*(set(run.epochs) for run in usable)) if usable else set()
    epoch = max(shared, default=None)
    times = [run.seconds[-1] if run.seconds else None for run in usable]
    told = [time for time in times if time is not None]
    seconds = min(told) if told and len(told) == len(times) else None
    return Comparison(name, mode, epoch, seconds, tuple(_compared(run, name, mode, epoch, seconds) for run in runs))


def check_metric(metric: str | None, runs: Sequence[Run]) -> None:
    """Checks that some run has a column.

    Raises:
        UsageError: none has; the message names those that there are.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.columns))
    if metric is None or metric in known or not known:
        return
    there = ", ".join(metrics_of(known) + [name for name in known if name not in metrics_of(known)])
    raise UsageError(f"--metric {metric}: no such column.{nearest(metric, known)} Columns: {there}.")


def _compared(run: Run, metric: str | None, mode: Mode, epoch: int | None, seconds: float | None) -> ComparedRun:
    if metric is None or metric not in run.columns or not run.cells:
        return ComparedRun(run, None, None, None, None)
    within = None
    if seconds is not None and run.seconds is not None:
        within = bisect_right(run.seconds, seconds) - 1
    same = run.epochs.index(epoch) if epoch is not None else None
    best = run.best(metric, mode)
    return ComparedRun(
        run,
        *(_point(run, metric, index) for index in (len(run.cells) - 1, best, same, None if within == -1 else within)),
    )


def _point(run: Run, metric: str, index: int | None) -> Point | None:
    if index is None:
        return None
    return Point(run.epochs[index], run.texts(metric)[index], run.seconds[index] if run.seconds else None)


def as_plain(comparison: Comparison, *, rows: bool) -> list[dict[str, Any]]:
    """Returns the runs for programs, with values exactly as in their histories.

    Args:
        comparison: of these runs.
        rows: whether the histories themselves are wanted, too.
    """
    return [_plain(one, comparison, rows=rows) for one in comparison.runs]


def _plain(one: ComparedRun, whole: Comparison, *, rows: bool) -> dict[str, Any]:
    run = one.run
    plain: dict[str, Any] = {
        "run": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "damage": list(run.damage),
        "starts": len(run.starts),
        "epoch": run.epoch,
        "epochs": run.planned,
        "seconds": run.seconds[-1] if run.seconds else None,
        "metric": whole.metric,
        "mode": whole.mode,
        "final": _plain_point(one.final),
        "best": _plain_point(one.best),
        "at_epoch": _plain_point(one.at_epoch),
        "at_time": _plain_point(one.at_time),
    }
    if rows:
        plain["columns"] = list(run.columns)
        plain["rows"] = [dict(zip(run.columns, map(plain_value, row), strict=True)) for row in run.cells]
    return plain


def _plain_point(point: Point | None) -> dict[str, Any] | None:
    return None if point is None else {"epoch": point.epoch, "value": plain_value(point.cell), "seconds": point.seconds}


def plain_value(cell: str) -> int | float | str | None:
    """Returns a cell's value as JSON can have it: NaN and the infinities are texts there, as they are written."""
    value = value_of(cell)
    return cell if isinstance(value, float) and not abs(value) < float("inf") else value
