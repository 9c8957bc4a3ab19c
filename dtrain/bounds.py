"""Where training begins, how much of the data it takes, and what is done of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.metrics import PassResult


@dataclass(frozen=True)
class Limits:
    """How much of the data a short run takes.

    Attributes:
        train: number of the training loader's batches, None for all.
        valid: number of the validation loader's batches, None for all.
        merge: how many of a loader's batches are joined to one before they are dealt out.
        same: whether every epoch takes the same training batches.
    """

    train: int | None = None
    valid: int | None = None
    merge: int = 1
    same: bool = False


@dataclass(frozen=True)
class Trained:
    """An epoch's train pass that is done.

    Attributes:
        result: what it came to.
        steps: the rank's shares of it; as many on every rank.
    """

    result: PassResult
    steps: int


@dataclass(frozen=True)
class Start:
    """Where training begins: at the first epoch, or where a checkpoint was saved.

    Attributes:
        epoch: the first one that is not whole.
        skip: the rank's shares of it that are done.
        table: what `MeanTable.state` returned after them, or None.
        seconds: how long they took.
        randomness: puts the random streams to where they were.
        trained: the epoch's train pass, where it is done and only validation is left; None else.
        aside: seconds of the pass besides, as in `PassResult`.
        untimed: samples of rank 0 in them.
    """

    epoch: int = 1
    skip: int = 0
    table: Mapping[str, Any] | None = None
    seconds: float = 0.0
    randomness: Callable[[], None] | None = None
    trained: Trained | None = None
    aside: float = 0.0
    untimed: int = 0
