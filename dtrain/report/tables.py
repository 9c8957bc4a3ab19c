"""Histories as tables: for a terminal, shortened to fit; for a pipe, whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len

from dtrain.report.compare import Comparison, Point
from dtrain.report.runs import Run
from dtrain.report.words import duration, moment, printable, rounded
from dtrain.rundir.columns import EPOCH, NO_METRICS, Mode, base_of

_MOST_ROWS = 20  # of a terminal's table; then the first and the last ones, and the best
_FIRST, _LAST = 4, 12
_MOST_NAMED = 20
_GAP = "  "
_DOTS = "..."


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        head: the columns' names.
        rows: as many cells in each.
        marked: the indices of rows that stand out.
        under: what there is to say below it, a line each.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    under: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns head and rows in columns of equal width."""
        whole = (self.head, *self.rows)
        widths = [max(cell_len(line[i]) for line in whole) for i in range(len(self.head))]
        padded = (
            _GAP.join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
            for line in whole
        )
        return [line.rstrip() for line in padded]

    def fitted(self, width: int | None, spare: Sequence[str]) -> Grid:
        """Returns the table without so many of the spare columns, the first ones first, that it fits a terminal.

        Args:
            width: characters; None leaves it as it is.
            spare: the names of columns that may be left out.
        """
        if width is None:
            return self
        widths = [max(map(cell_len, column)) for column in zip(self.head, *self.rows, strict=True)]
        total = sum(widths) + len(_GAP) * (len(widths) - 1)
        places: dict[str, list[int]] = {}
        for at, name in reversed(list(enumerate(self.head))):
            places.setdefault(name, []).append(at)
        left_out: dict[int, str] = {}
        for name in spare:
            if total <= width:
                break
            at = places[name].pop()
            left_out[at] = name
            total -= widths[at] + len(_GAP)
        kept = [at for at in range(len(self.head)) if at not in left_out]
        rows = tuple(tuple(row[at] for at in kept) for row in self.rows)
        under = (*self.under, *_left_out_note(list(left_out.values())))
        return replace(self, head=tuple(self.head[at] for at in kept), rows=rows, under=under)


def history_grid(run: Run, *, metric: str | None, mode: Mode | None, width: int | None) -> Grid:
    """Returns a run's history.

    Args:
        run: the run; it has rows.
        metric: the column by which the best epoch is told, by default as `Run.monitor`.
        mode: which end of it is best, by default as `Run.monitor`.
        width: characters of the terminal that it is to fit, None for all columns and rows.
    """
    best = run.best(metric, mode)
    name, own_mode = run.monitor(metric)
    rows = list(range(len(run.cells))) if width is None else shortened(len(run.cells), best)
    under = _about_best(run, name, mode or own_mode, best)
    if len(rows) < len(run.cells):
        under.append(f"{len(run.cells) - len(rows)} of {len(run.cells)} epochs not shown (--all)")
    whole = replace(_history(run, rows, best), under=tuple(under))
    return whole.fitted(width, [printable(column) for column in droppable(run.columns, name)])


def shortened(count: int, best: int | None) -> list[int]:
    """Returns which of so many rows a terminal shows: all, or the first four, the best, and the last twelve."""
    if count <= _MOST_ROWS:
        return list(range(count))
    return sorted({*range(_FIRST), *range(count - _LAST, count), *([] if best is None else [best])})


def droppable(columns: Sequence[str], metric: str | None) -> list[str]:
    """Returns the columns that a narrow terminal goes without, first those that it misses least.

    What is no metric goes first, then metrics from the right. The epoch stays, and the metric that says what is best.
    """
    rest = [name for name in reversed(columns) if name not in (EPOCH, metric)]
    return sorted(
        rest, key=lambda name: (name not in NO_METRICS, metric is not None and base_of(name) == base_of(metric))
    )


def _history(run: Run, rows: Sequence[int], best: int | None) -> Grid:
    lines: list[tuple[str, ...]] = []
    marked = set()
    for before, row in zip([-1, *rows], rows, strict=False):
        if row != before + 1:
            lines.append(("", *[_DOTS] * len(run.columns)))
        if row == best:
            marked.add(len(lines))
        lines.append(("*" if row == best else "", *map(rounded, run.cells[row])))
    return Grid(("", *map(printable, run.columns)), tuple(lines), frozenset(marked))


def _about_best(run: Run, metric: str | None, mode: Mode, best: int | None) -> list[str]:
    if metric is None:
        return []
    if best is None:
        return [f"best epoch: none, {printable(metric)} is never finite"]
    word = "lowest" if mode == "min" else "highest"
    return [f"* best epoch: {run.epochs[best]} ({word} {printable(metric)}, {run.texts(metric)[best]})"]


def _left_out_note(columns: Sequence[str]) -> list[str]:
    more = f", and {len(columns) - _MOST_NAMED} more" if len(columns) > _MOST_NAMED else ""
    return [f"columns not shown: {', '.join(map(printable, columns[:_MOST_NAMED]))}{more} (--all)"] if columns else []


def about(run: Run) -> str:
    """Returns a line on a run: its name, state, epochs, starts and training time."""
    times = len(run.starts)
    started = f", {times} start{'' if times == 1 else 's'}" if times else ""
    time = f", {duration(run.seconds[-1])} of training" if run.seconds else ""
    return f"{printable(run.name)}: {run.state}, {_epochs(run)}{started}{time}"


def damage_lines(runs: Sequence[Run]) -> list[str]:
    """Returns a line for each run of which something is damaged: what, and why."""
    return [f"{printable(run.name)} is damaged: {printable('; '.join(run.damage))}" for run in runs if run.damage]


def _epochs(run: Run) -> str:
    of = f" of {run.planned}" if run.planned is not None else ""
    return f"{run.epoch}{of} epoch{'' if (run.planned or run.epoch) == 1 else 's'}"


def comparison_grid(whole: Comparison) -> Grid:
    """Returns runs side by side."""
    at_epoch = "SAME EPOCH" if whole.epoch is None else f"AT EPOCH {whole.epoch}"
    at_time = "SAME TIME" if whole.seconds is None else f"AFTER {duration(whole.seconds)}"
    head = ("RUN", "STATE", "EPOCHS", "STARTS", "FINAL", "BEST", at_epoch, at_time)
    rows = [
        (
            printable(one.run.name),
            one.run.state,
            _progress(one.run),
            str(len(one.run.starts) or "-"),
            _value(one.final),
            _with_epoch(one.best),
            _value(one.at_epoch),
            _with_epoch(one.at_time),
        )
        for one in whole.runs
    ]
    return Grid(head, tuple(rows), _leaders(whole), tuple(_about_comparison(whole)))


def _leaders(whole: Comparison) -> frozenset[int]:
    """The runs whose best is the best of all."""
    sign = 1.0 if whole.mode == "min" else -1.0
    found = {i: sign * float(one.best.cell) for i, one in enumerate(whole.runs) if one.best is not None}
    least = min(found.values(), default=None)
    return frozenset(i for i, value in found.items() if value == least) if len(whole.runs) > 1 else frozenset()


def _about_comparison(whole: Comparison) -> list[str]:
    if whole.metric is None:
        return ["no run has metrics yet"]
    word = "lowest" if whole.mode == "min" else "highest"
    told = [f"{printable(whole.metric)}, {word} is best; (n): epoch n. Choose another column with --metric."]
    if whole.seconds is not None:
        told.append("AFTER is training time: the sum of the column seconds.")
    return told


def _value(point: Point | None) -> str:
    return "-" if point is None else rounded(point.cell)


def _with_epoch(point: Point | None) -> str:
    return "-" if point is None else f"{rounded(point.cell)} ({point.epoch})"


def _progress(run: Run) -> str:
    return f"{run.epoch}/{run.planned}" if run.planned is not None else str(run.epoch or "-")


def listing_grid(runs: Sequence[Run], changed: Sequence[float], metric: str | None, mode: Mode | None) -> Grid:
    """Returns a list of runs, each with its own best epoch.

    Args:
        runs: in the order to be shown.
        changed: when each of them last changed, in seconds since the epoch.
        metric: by which the best is told; by default as each run's config says.
        mode: which end of it is best.
    """
    rows = [
        (printable(run.name), moment(at), run.state, _progress(run), _best_words(run, metric, mode))
        for run, at in zip(runs, changed, strict=True)
    ]
    return Grid(("RUN", "CHANGED", "STATE", "EPOCHS", "BEST"), tuple(rows))


def folded_words(count: int) -> list[str]:
    """Returns a line on the runs that a list has left out, since they ended before their first epoch."""
    if not count:
        return []
    runs, which = ("run that ended before its", "it") if count == 1 else ("runs that ended before their", "them")
    return [f"not shown: {count} {runs} first epoch (--all shows {which}, dtrain clean deletes {which})"]


def _best_words(run: Run, metric: str | None, mode: Mode | None) -> str:
    best = run.best(metric, mode)
    name = run.monitor(metric)[0]
    if best is None or name is None:
        return "-"
    return f"{printable(name)} {rounded(run.texts(name)[best])} ({run.epochs[best]})"
