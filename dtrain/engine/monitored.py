"""What ReduceLROnPlateau watches, and whether its mode is that of the column."""

from __future__ import annotations

import difflib

from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import adds_columns
from dtrain.engine.loop import Engine
from dtrain.engine.valid_loaders import column_of
from dtrain.engine.whole_set import WholeSet
from dtrain.errors import UsageError
from dtrain.rundir.columns import NO_METRICS, VALID, Mode, base_of, check_monitor, sure_mode_of, watched


def watched_column(engine: Engine) -> str | None:
    """Returns the column that an engine's scheduler watches; None where it is no ReduceLROnPlateau."""
    if not isinstance(engine.task.scheduler, ReduceLROnPlateau):
        return None
    found = watched(engine.task.monitor)
    return found[-1] if engine.valid is None else found[0]


def check_plateau(engine: Engine, key: str, place: str, declared: Mode | None = None) -> None:
    """Looks, before the first step, whether ReduceLROnPlateau can watch its column; does nothing for other schedulers.

    Args:
        engine: it has not trained yet.
        key: what the column is given as.
        place: where it is given, in words.
        declared: which end of the column is best, where somebody said so.

    Raises:
        UsageError: it counts optimizer steps, its mode is not the column's, or the column is one of validation, of
            which there is none. The engine raises it of a column that there is not.
    """
    scheduler, column = engine.task.scheduler, watched_column(engine)
    if column is None:
        return
    if engine.task.interval == "step":
        raise UsageError(
            "ReduceLROnPlateau watches a column of the history, with a new value after each epoch, but is set to count "
            "optimizer steps. Return it from build_scheduler without 'step' (scheduler_interval='epoch').",
            on_all_ranks=True,
        )
    check_early(engine, engine.task.monitor, key, place)
    best = declared or sure_mode_of(column)
    if best is not None and scheduler.mode != best:
        better = "lower" if best == "min" else "higher"
        raise UsageError(
            f"ReduceLROnPlateau has mode={scheduler.mode!r} and watches {column} ({key}, {place}), where {better} is "
            f"better: it would cut the learning rate while {column} improves. Use mode={best!r}, or set another "
            f"column: {_REMEDIES.get(key, key)}=COLUMN.",
            on_all_ranks=True,
        )


_REMEDIES = {"checkpoint.monitor": "scheduler.monitor"}


def check_early(engine: Engine, monitor: str | None, key: str, place: str = "") -> None:
    """Has the name of a watched column compared as soon as the columns are known, not first at an epoch's end.

    Those of training are known after the first batch, those of validation after its first one. Where hooks may add
    columns, any is compared at the end of an epoch, and missing there is a warning; and so is one that begins as those
    of a function of the whole set do.

    Args:
        engine: it has not trained yet.
        monitor: the column; None for one that is there.
        key: what the column is given as.
        place: where it is given, in words; may be empty.

    Raises:
        UsageError: it is a value of validation, and there is no validation. The engine raises it of a column that
            there is not.
    """
    if monitor is None or monitor in NO_METRICS:
        return
    passes = () if engine.valid is None else engine.valid.parts
    loaders = {"", *(one.name for one in passes)}
    whole = [name for name, metric in engine.task.metrics.items() if isinstance(metric, WholeSet)]
    parts = [f"{column_of(loader, name)}_" for loader in loaders for name in whole]
    adds = adds_columns(engine.task.hooks) or base_of(monitor).startswith(tuple(parts))
    if engine.valid is None and monitor.startswith(VALID) and not adds:
        raise UsageError(
            f"{key} = {monitor!r} ({place}): there is no validation, so there is no such column.", on_all_ranks=True
        )
    prefixes = [f"{VALID}{column_of(one.name, '')}" for one in passes]
    if passes and monitor.startswith(VALID) and not monitor.startswith(tuple(prefixes)) and not adds:
        raise UsageError(
            f"{key} = {monitor!r} ({place}): there are several validation loaders, so there is no such column. Name "
            f"one of theirs, such as {' or '.join(_alike(monitor, prefixes))}.",
            on_all_ranks=True,
        )
    if not adds:
        engine.callbacks.add(_ColumnCheck(monitor, key, place, loaders=len(passes)))


def _alike(monitor: str, prefixes: list[str]) -> list[str]:
    """Returns columns that may have been meant: of the loader whose name is nearly this one's, else of each."""
    parts = monitor.split("_")
    for end in range(len(parts) - 1, 1, -1):
        near = difflib.get_close_matches("_".join(parts[:end]) + "_", prefixes, n=1, cutoff=0.8)
        if near:
            return [near[0] + "_".join(parts[end:])]
    return [f"{prefix}{base_of(monitor)}" for prefix in prefixes]


class _ColumnCheck(EngineCallback):
    """Compares the name of a watched column with the columns, once they are known."""

    order = Order.CHECKS

    def __init__(self, monitor: str, key: str, place: str, *, loaders: int) -> None:
        self._monitor, self._key, self._place = monitor, key, place
        self._loaders = loaders  # of validation, of which each tells its names
        self._train: tuple[str, ...] = ()
        self._valid: list[tuple[str, ...]] = []

    def on_values_known(self, split: str, names: tuple[str, ...]) -> None:
        """Compares, where this split has the column.

        Raises:
            UsageError: no such column.
        """
        if split == "train":
            self._train = names
            valid = names if self._loaders == 1 else ()
        else:
            self._valid.append(names)
            valid = tuple(dict.fromkeys(name for known in self._valid for name in known))
            if len(self._valid) < self._loaders:
                return  # the other loaders' are not known yet
        if self._monitor.startswith(VALID) == (split == "valid"):
            self._compare((*self._train, *(f"{VALID}{name}" for name in valid)))

    def _compare(self, known: tuple[str, ...]) -> None:
        try:
            check_monitor(self._monitor, (*known, *NO_METRICS), self._key, self._place)
        except UsageError as error:
            error.on_all_ranks = True  # the same on every rank
            raise
