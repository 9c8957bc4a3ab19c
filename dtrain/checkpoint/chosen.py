"""A run's checkpoint whose weights are asked for: the best, the last, or one by its name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from dtrain.checkpoint.folder import Saved, all_saved, check_place, read_manifest
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.config.schema import CheckpointConfig
from dtrain.errors import CheckpointError, UsageError, nearest
from dtrain.layout import CHECKPOINTS, checkpoint_place, checkpoints_in

logger = logging.getLogger(__name__)

Which = Literal["best", "last"]


def checkpoints_of(run: Path) -> Path:
    """Returns the folder of a run's checkpoints: below the run's, or itself, as `save_weights` fills one."""
    inside = run / CHECKPOINTS
    return run if not inside.is_dir() and checkpoints_in(run) else inside


def choose_checkpoint(run: Path, which: str, policy: CheckpointConfig | None = None) -> Saved:
    """Returns one of a run's checkpoints.

    Args:
        run: the run's folder, or one that holds checkpoints.
        which: "best", by the policy's monitor and mode; where no epoch has a number to compare, it is the last one.
            "last": of an epoch's end. Else a name, such as "epoch-3".
        policy: of the run's config; None for one that says nothing.

    Raises:
        UsageError: there is none, none of this name, or the named one is damaged.
    """
    folder = checkpoints_of(run)
    if which not in ("best", "last"):
        return _named(folder, which)
    damaged = _damaged(folder)
    for words in damaged:
        logger.warning("%s; it is left out", words)
    policy = CheckpointConfig() if policy is None else policy
    keeping = RetentionPolicy(monitor=policy.monitor, mode=policy.mode)
    saved = keeping.chosen(folder, "best" if which == "best" else "last") or keeping.chosen(folder, "last")
    if saved is None and damaged:
        raise UsageError(f"{folder} has no checkpoint that is whole: {'; '.join(damaged)}. Train the run again.")
    if saved is None:
        raise UsageError(f"{run} has no checkpoint: the run stopped before the end of its first epoch. Train it again.")
    return saved


def _named(folder: Path, name: str) -> Saved:
    place, path = checkpoint_place(name), folder / name
    if place is None or path not in checkpoints_in(folder):
        there = [one.path.name for one in all_saved(folder)]
        raise UsageError(
            f"{folder} has no checkpoint {name!r}.{nearest(name, there)} Use best, last"
            f"{''.join(f', {one}' for one in there[-5:])}."
        )
    try:
        facts = read_manifest(path)
        check_place(path, facts)
    except CheckpointError as error:
        raise UsageError(f"{error}. Use another checkpoint.") from None
    return Saved(path, *place, facts)


def _damaged(folder: Path) -> list[str]:
    """Returns, in words, what is wrong with the checkpoints that cannot be read."""
    words = []
    for path in checkpoints_in(folder):
        try:
            check_place(path, read_manifest(path))
        except CheckpointError as error:
            words.append(str(error))
    return words
