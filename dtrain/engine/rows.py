"""The row that an epoch adds to the history."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from dtrain.engine.metrics import PassResult
from dtrain.engine.valid_loaders import column_of
from dtrain.rundir.columns import EPOCH, NO_METRICS, VALID

logger = logging.getLogger(__name__)


def epoch_row(epoch: int, train: PassResult, valid: PassResult | None, rate: float | None) -> dict[str, Any]:
    """Returns an epoch's row.

    Args:
        epoch: 1 or more.
        train: what its train pass came to.
        valid: what its validation came to, where there is one.
        rate: the learning rate; None where no optimizer is known.
    """
    row: dict[str, Any] = {"epoch": epoch, **train.means}
    if valid is not None:
        row |= {f"{VALID}{name}": mean for name, mean in valid.means.items()}
    if rate is not None:
        row["lr"] = rate
    row["seconds"] = train.seconds + train.aside + (valid.seconds if valid is not None else 0.0)
    timed = train.samples - train.untimed
    row["samples_per_second"] = timed / train.seconds if timed > 0 else train.samples / (train.seconds + train.aside)
    return row


def with_columns(row: Mapping[str, Any], columns: Mapping[str, float]) -> dict[str, Any]:
    """Returns a row with further columns, which come after its metrics."""
    own = {**row, **columns}
    after = {name: own.pop(name) for name in NO_METRICS if name in own and name != EPOCH}
    return {**own, **after}


def warn_unused_metrics(metrics: Iterable[str], row: Mapping[str, Any], loaders: Iterable[str] = ("",)) -> None:
    """Warns of metrics that a row has no value of.

    Args:
        metrics: their names.
        row: the first epoch's.
        loaders: the names of the validation loaders.
    """
    loaders = tuple(loaders)
    for name in metrics:
        named = (name, *(f"{VALID}{column_of(loader, name)}" for loader in loaders))
        if not any(column in named or column.startswith(tuple(f"{one}_" for one in named)) for column in row):
            logger.warning(
                "metric %r is never updated: no step returns a value of this name, as in "
                '{"loss": loss, %r: (predictions, labels)}.',
                name,
                name,
            )
