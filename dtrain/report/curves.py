"""What a plot of runs shows, whatever draws it: panels, and in each the runs' lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.errors import UsageError, nearest
from dtrain.report.runs import Run
from dtrain.rundir.columns import EPOCH, VALID, paired

TIME = "time"
_LARGEST = 1e300  # of a drawn value: axes need some room beyond it


@dataclass(frozen=True, eq=False)
class Line:
    """A run's column.

    Attributes:
        run: whose.
        number: of the run, which its colour depends on.
        column: the column's name.
        train: whether it is a metric of the training of which there is one of the validation, too, in some run.
        xs: where its points are.
        ys: their values; None where the history has none, or no number.
        best: the index of the run's best epoch, where this is the column that says so; None else.
        resumed: the indices of the rows after which the run was started again.
    """

    run: Run
    number: int
    column: str
    train: bool
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    best: int | None
    resumed: tuple[int, ...]

    def drawable(self, *, log: bool) -> list[float]:
        """Returns the values, NaN where there is nothing to draw."""
        return [y if y is not None and abs(y) <= _LARGEST and not (log and y <= 0) else math.nan for y in self.ys]

    @property
    def odd(self) -> list[int]:
        """The rows whose values are NaN or infinite."""
        return [i for i, y in enumerate(self.ys) if y is not None and not math.isfinite(y)]


@dataclass(frozen=True)
class Panel:
    """A metric's curves.

    Attributes:
        title: the metric.
        lines: of all runs.
    """

    title: str
    lines: tuple[Line, ...]

    def remarks(self, *, log: bool) -> list[str]:
        """Returns what the curves cannot show, in words."""
        told = []
        for line in self.lines:
            numbers = [y for y in line.ys if y is not None and math.isfinite(y)]
            low = sum(y <= 0 for y in numbers) if log else 0
            large = sum(abs(y) > _LARGEST for y in numbers)
            if line.odd:
                told.append(f"{_counted(len(line.odd), line)} NaN or infinite")
            if low:
                told.append(f"{_counted(low, line)} not above 0: not shown on a log scale")
            if large:
                told.append(f"{_counted(large, line)} beyond {_LARGEST:g}: too large to draw")
        return told


def _counted(count: int, line: Line) -> str:
    return f"{line.run.name}: {line.column} of {count} epoch{' is' if count == 1 else 's is'}"


def make_panels(runs: Sequence[Run], metrics: Sequence[str] = (), x: str = EPOCH) -> list[Panel]:
    """Returns the panels of a plot.

    Args:
        runs: those to be drawn; those without rows are left out.
        metrics: each a column, or what two columns are called without "val_"; none for all metrics.
        x: "epoch", "time" (hours of training), or a column.

    Raises:
        UsageError: no run has such a column, or none has a row.
    """
    usable = [(number, run) for number, run in enumerate(runs) if run.cells]
    if not usable:
        raise UsageError(f"nothing to plot yet: no epochs in {', '.join(str(run.folder) for run in runs)}.")
    known = list(dict.fromkeys(name for _, run in usable for name in run.columns))
    pairs = paired(known)
    for name in metrics:
        _check("--metric", name, [*known, *pairs])
    if x not in (EPOCH, TIME):
        _check("--x", x, [EPOCH, TIME, *known])
    wanted = {name: pairs.get(name, [name]) for name in metrics} if metrics else pairs
    if not wanted:
        raise UsageError(f"no metric to plot; the columns are {', '.join(known)}. Choose one with --metric.")
    best = {number: (run.monitor()[0], run.best()) for number, run in usable}
    return [Panel(title, tuple(_lines(usable, columns, x, best))) for title, columns in wanted.items()]


def _check(option: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        there = ", ".join(dict.fromkeys(known))
        raise UsageError(f"{option} {name}: no run has this column.{nearest(name, known)} Columns: {there}.")


def _lines(
    usable: Sequence[tuple[int, Run]], columns: Sequence[str], x: str, best: Mapping[int, tuple[str | None, int | None]]
) -> list[Line]:
    both = len(columns) > 1
    return [
        Line(
            run,
            number,
            column,
            both and not column.startswith(VALID),
            tuple(where(run, x)),
            tuple(run.numbers(column)),
            best[number][1] if column == best[number][0] else None,
            tuple(_rows_of(run)),
        )
        for number, run in usable
        for column in columns
        if run.has(column)
    ]


def where(run: Run, x: str) -> list[float]:
    """Returns where a run's rows are on the x axis; NaN where its history does not say."""
    if x == EPOCH:
        return [float(epoch) for epoch in run.epochs]
    if x == TIME:
        return [second / 3600 for second in run.seconds] if run.seconds is not None else [math.nan] * len(run.cells)
    return [math.nan if value is None else value for value in run.numbers(x)]


def _rows_of(run: Run) -> list[int]:
    rows = {epoch: row for row, epoch in enumerate(run.epochs)}
    return sorted({rows[epoch] for epoch in run.resumed_after() if epoch in rows})


def axis_title(x: str) -> str:
    """Returns what is written under the x axis."""
    return "hours of training" if x == TIME else x
