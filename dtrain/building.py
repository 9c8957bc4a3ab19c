"""A config's task, and the engine that computes what the config says."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.bounds import Limits
from dtrain.clipping import Limit
from dtrain.config import Settings
from dtrain.config.schema import TrainConfig
from dtrain.dealing import Dealing
from dtrain.engine import Engine
from dtrain.errors import UsageError
from dtrain.fsdp.parts import check_parts
from dtrain.fsdp.settings import chosen_sharding
from dtrain.learning import Task
from dtrain.recipe import bind, load_recipe
from dtrain.schedules import follow_schedule
from dtrain.seeding import seed_everything
from dtrain.sharding import ShardedLoader
from dtrain.world import World


def load_task(settings: Settings) -> Task:
    """Seeds, imports the recipe and builds its objects, so that every rank builds the same net."""
    seed_everything(settings.config.train.seed)
    return bind(load_recipe(settings.config.recipe, settings.base), settings)


def steps_per_epoch(task: Task, ranks: int, train: TrainConfig) -> int | None:
    """Returns the train steps (micro-batches) of each rank in an epoch; None where the loader cannot tell its length.

    Args:
        task: its training loader is asked.
        ranks: how many there are.
        train: the config's section.
    """
    how = Dealing(0, ranks, train.batch, fill=True, limit=train.overfit_batches or train.limit_batches)
    return ShardedLoader(task.dl_train, how, train.seed, "train").steps()


def loader_batch(task: Task) -> int | None:
    """Returns the batch size of the training loader; None where it cannot tell."""
    loader = task.dl_train
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


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
        UsageError: the training loader has no length, so that this cannot be known.
    """
    train = settings.config.train
    if train.max_steps is None or "train.epochs" in settings.places:
        return train.epochs
    steps = steps_per_epoch(task, ranks, train)
    if steps is None:
        raise UsageError(
            f"train.max_steps = {train.max_steps}: the training loader has no length. Give train.epochs, too: training "
            "ends with what comes first."
        )
    # Without a batch there is nothing to count by; that is told where the loader is read.
    return -(-train.max_steps // -(-steps // train.accumulation)) if steps else train.epochs


def configured_engine(task: Task, world: World, settings: Settings, **more: Any) -> Engine:
    """Returns an engine that computes what the config says.

    Args:
        task: the recipe's objects.
        world: the ranks.
        settings: the config.
        more: how long, how much and for whom: further fields of the engine.
    """
    train = settings.config.train
    if train.channels_last:
        task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = train.overfit_batches or train.limit_batches
    more.setdefault("same_draws", train.same_draws)
    more.setdefault("limits", Limits(batches, train.limit_batches, same=train.overfit_batches is not None))
    sharding = chosen_sharding(train, world.sharding)
    check_parts(task.module, sharding)
    engine = Engine(
        task,
        world,
        seed=train.seed,
        batch=train.batch,
        accumulation=train.accumulation,
        sync_batchnorm=train.sync_batchnorm,
        fetch_batches=train.fetch_batches,
        precision=train.precision,
        compile=train.compile,
        clip=Limit(train.clip_norm, train.clip_value),
        sharding=sharding,
        averaging=train.average,
        ema_decay=train.ema_decay,
        val_every_steps=train.val_every_steps,
        max_steps=train.max_steps,
        **more,
    )
    follow_schedule(engine, train)
    return engine
