"""A config's task, and the engine that computes what the config says."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from dtrain.config import Settings
from dtrain.config.schema import TrainConfig
from dtrain.data.loader_group import batch_size_of
from dtrain.distributed.fsdp_settings import chosen_sharding
from dtrain.distributed.seeding import seed_everything
from dtrain.distributed.world import World
from dtrain.engine.call_hooks import call_hooks
from dtrain.engine.hooks import ARGUMENTS
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import Limits
from dtrain.engine.schedules import follow_schedule
from dtrain.engine.train_step import Task
from dtrain.errors import UsageError
from dtrain.model.fsdp_parts import check_parts
from dtrain.recipe.loader import Recipe, bind, load_recipe
from dtrain.recipe.supplied import epoch_length, rank_steps
from dtrain.trainer.initial import InitialWeights, initial_weights


def load_task(settings: Settings, initial: InitialWeights | None = None) -> Task:
    """Seeds, imports the recipe and builds its objects, so that every rank builds the same net; see `load_bound`."""
    return load_bound(settings, initial)[1]


def load_bound(settings: Settings, initial: InitialWeights | None = None) -> tuple[Recipe, Task]:
    """Seeds, imports the recipe and builds its objects; returns both.

    Args:
        settings: the config.
        initial: what the net begins with, where that was read; else it is read as `train.init_from` says.
    """
    initial = initial_weights(settings) if initial is None else initial
    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    return recipe, bind(recipe, settings, initial)


def loader_batch(task: Task) -> int | None:
    """Returns the batch size of the training loader; None where it cannot tell."""
    return batch_size_of(task.dl_train)


def step_samples(batch: int, ranks: int, train: TrainConfig) -> int:
    """Returns the samples of an optimizer step, on all ranks together.

    Args:
        batch: the loader's batch size.
        ranks: how many there are.
        train: the config's section.
    """
    return batch * (ranks if train.batch == "per_rank" else 1) * train.accumulation


def run_epochs(task: Task, ranks: int, settings: Settings) -> int:
    """Returns the epochs of a run: those of the config, or, where only `train.max_steps` is given, as many as it takes.

    Raises:
        UsageError: the training loader has no length, and only a part of its batches is taken.
    """
    train, by_rank = settings.config.train, task.batches.by_rank
    if train.max_steps is None or "train.epochs" in settings.places:
        return train.epochs
    length = epoch_length(task.dl_train, ranks, settings, by_rank=by_rank)
    if length is not None:
        return -(-train.max_steps // length)
    steps = rank_steps(task.dl_train, ranks, train, by_rank=by_rank)
    if steps is None:
        raise UsageError(
            f"train.max_steps = {train.max_steps} with train.limit_batches or train.overfit_batches: the training "
            "loader has no length, so the number of epochs is unknown. Also set train.epochs."
        )
    # Without a batch there is nothing to count by; that is told where the loader is read.
    return -(-train.max_steps // -(-steps // train.accumulation)) if steps else train.epochs


def configured_engine(
    task: Task, world: World, settings: Settings, *, hooks: Container[str] = ARGUMENTS, **more: Any
) -> Engine:
    """Returns an engine that computes what the config says.

    Args:
        task: the recipe's objects.
        world: the ranks.
        settings: the config.
        hooks: which of the user's are called.
        more: how long, how much and for whom: further fields of the engine.
    """
    train = settings.config.train
    if train.channels_last:
        task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = train.overfit_batches or train.limit_batches
    more.setdefault("options", RunOptions.of(dict(train)))
    length = epoch_length(task.dl_train, world.size, settings, by_rank=task.batches.by_rank)
    more.setdefault("epoch_steps", length)
    more.setdefault("limits", Limits(batches, train.limit_batches, same=train.overfit_batches is not None))
    sharding = chosen_sharding(train, world.sharding)
    check_parts(task.module, sharding)
    engine = Engine(
        task,
        world,
        sharding=sharding,
        val_every_steps=train.val_every_steps,
        max_steps=train.max_steps,
        **more,
    )
    call_hooks(engine, hooks)
    follow_schedule(engine, train)
    return engine
