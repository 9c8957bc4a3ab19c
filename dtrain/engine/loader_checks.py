"""Looked at before the first step: whether the ranks have the same model and loaders, and steps fit their batches."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.data.loader import ShardedLoader
from dtrain.data.loader_group import train_splits
from dtrain.data.same_data import check_whole
from dtrain.distributed.consistency import check_same_task, check_validation
from dtrain.distributed.world import World
from dtrain.engine.passes import ValidPass
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import split_of


def check_loaders(task: Task, world: World, train: ShardedLoader, passes: Sequence[ValidPass]) -> None:
    """Compares the ranks' models and loaders before the first step.

    Raises:
        UsageError, DataError, StepError: they differ, or do not fit the step.
    """
    views = train.views("train") | {split_of(one.name): one.loader for one in passes}
    loaders = {split: view.loader for split, view in views.items()} | train_splits(task.dl_train)
    own = [split for split, view in views.items() if view.own]
    check_same_task(world, task.module, loaders, own)
    for one in passes:
        split = split_of(one.name)
        check_validation(one.step, None if split in own else one.loader.loader, split)
    if task.batches.by_rank:
        check_whole({split: loader for split, loader in loaders.items() if views[split].indexed}, world)
