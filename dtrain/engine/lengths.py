"""How long a run is, in optimizer steps, and a warning where its epochs are all the same part of the data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dtrain.data.continued import refuse_shared
from dtrain.data.dataloaders import has_indices
from dtrain.data.loader import ShardedLoader
from dtrain.data.loader_group import train_by_name
from dtrain.data.sources import knows_epochs
from dtrain.engine.passes import check_starts_anew
from dtrain.engine.position import Limits

if TYPE_CHECKING:
    from dtrain.engine.loop import Engine

logger = logging.getLogger(__name__)


def run_updates(loader: ShardedLoader, epochs: int, accumulation: int, most: int | None) -> int | None:
    """Returns the optimizer steps of a whole run; None where the loader cannot tell its length.

    Args:
        loader: the rank's view of the training loader.
        epochs: how many there are.
        accumulation: micro-batches of an optimizer step.
        most: optimizer steps after which the run ends; None where its epochs end it.
    """
    steps = loader.steps_of_epochs(epochs)
    total = None if steps is None else sum(-(-number // accumulation) for number in steps)
    if most is None:
        return total
    return most if total is None else min(total, most)


def check_epochs(engine: Engine) -> None:
    """Looks whether the loaders can be read in each epoch as the engine's fields say.

    Raises:
        UsageError: one is used up after the first, or one that goes on shares a part with validation.
    """
    train, passes = engine.task.dl_train, () if engine.valid is None else engine.valid.parts
    anew = [
        *(train_by_name(train).values() if engine.epoch_steps is None else []),
        *(one.loader.loader for one in passes),
    ]
    check_starts_anew(engine.epochs, *anew)
    for one in passes if engine.epoch_steps is not None else ():
        refuse_shared(engine.train_loader.sources, one.loader.sources)
    if engine.world.is_main:
        for one_train in train_by_name(train).values():
            _warn_of_same_batches(one_train, engine.limits, engine.epochs)


def _warn_of_same_batches(loader: Any, limits: Limits, epochs: int) -> None:
    """Warns where a limit lets each epoch read the same first batches of a loader that begins anew."""
    alike = has_indices(loader) or isinstance(loader, Iterator) or knows_epochs(loader)
    if limits.train is None or limits.same or epochs == 1 or alike:
        return
    logger.warning(
        "train.limit_batches=%s: the training loader is read in its own order, and begins anew in each epoch, so that "
        "all epochs have the same first batches. For epochs of so many optimizer steps that go on with the data: "
        "train.epoch_steps=%s.",
        *(limits.train, limits.train),
    )
