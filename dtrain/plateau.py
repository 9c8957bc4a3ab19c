"""What ReduceLROnPlateau watches, and whether its mode is that of the column."""

from __future__ import annotations

from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtrain.best import check_early
from dtrain.columns import Mode, sure_mode_of
from dtrain.engine import Engine
from dtrain.errors import UsageError


def watched_column(engine: Engine) -> str | None:
    """Returns the column that an engine's scheduler watches; None where it is no ReduceLROnPlateau."""
    if not isinstance(engine.task.scheduler, ReduceLROnPlateau):
        return None
    return engine.task.monitor or ("loss" if engine.valid is None else "val_loss")


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
        raise _agreed(
            "ReduceLROnPlateau watches a column of the history, with a new value after each epoch, and is set to count "
            "optimizer steps. Return it from build_scheduler without 'step' (scheduler_interval='epoch')."
        )
    check_early(engine, engine.task.monitor, key, place)
    best = declared or sure_mode_of(column)
    if best is not None and scheduler.mode != best:
        better = "lower" if best == "min" else "higher"
        raise _agreed(
            f"ReduceLROnPlateau has mode={scheduler.mode!r} and watches {column} ({key}, {place}), where {better} is "
            f"better: it would cut the learning rate while {column} improves. Make it with mode={best!r}, or name "
            f"another column: {_REMEDIES.get(key, key)}=COLUMN."
        )


_REMEDIES = {"checkpoint.monitor": "scheduler.monitor"}


def _agreed(text: str) -> UsageError:
    error = UsageError(text)
    error.agreed = True  # the same on every rank
    return error
