"""Engines for a bench: those of a run, on a task and settings with one thing changed or none, for a few batches."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.callbacks.progress import PlainLines
from dtrain.config import Settings
from dtrain.data.dataloaders import with_options
from dtrain.distributed.world import World
from dtrain.engine.callback import Callbacks
from dtrain.engine.hooks import IN_TRAINING
from dtrain.engine.loop import Engine
from dtrain.engine.position import Limits
from dtrain.engine.schedules import has_end
from dtrain.engine.train_step import Task
from dtrain.tools.bench.candidates import Candidate
from dtrain.trainer.agreed import agree
from dtrain.trainer.setup import configured_engine

_FUSED = ("Adam", "AdamW", "SGD")


def endless(settings: Settings) -> Settings:
    """Returns settings without what ends a run, or belongs to a run of a certain length."""
    train = settings.config.train
    changed = dict.fromkeys(("max_steps", "val_every_steps", "warmup_steps", "warmup_epochs", "warmup_fraction"))
    schedule = None if train.schedule is None else "constant"
    return _with_train(settings, **changed, schedule=schedule, swa_from=None)


def _with_train(settings: Settings, **keys: object) -> Settings:
    config = settings.config
    return replace(settings, config=config.model_copy(update={"train": config.train.model_copy(update=keys)}))


@contextlib.contextmanager
def bench_engine(
    task: Task, settings: Settings, world: World, batches: int, candidate: Candidate | None = None
) -> Iterator[Engine]:
    """Gives an engine that trains as the settings say, or with one change.

    Args:
        task: the user's objects.
        settings: the config.
        world: the ranks.
        batches: that a pass has on each rank, at most.
        candidate: the change.

    Raises:
        AgreedError: some of several ranks could not set up; every rank raises it.
        Exception: the sole rank could not.
    """

    def build() -> None:
        made.append(_engine(*varied(task, settings, candidate), world, batches))

    made: list[Engine] = []
    try:
        if world.size == 1:  # whose error is raised as it is
            build()
        else:
            agree(world, build)
        yield made[0]
    finally:
        for engine in made:
            engine.learner.close()
            if engine.captured is not None:
                engine.captured.close()
            engine.train_loader.close()
            if engine.draws is not None:
                engine.draws.leave()


def _engine(task: Task, settings: Settings, world: World, batches: int) -> Engine:
    train = settings.config.train
    per_step = world.size if train.batch == "per_rank" else 1
    scheduler = None if has_end(task.scheduler) else task.scheduler  # torch's own raises after its last step
    return configured_engine(
        replace(task, dl_valid=None, scheduler=scheduler),
        world,
        endless(settings),
        hooks=IN_TRAINING,
        epochs=1,
        epoch_steps=None,
        limits=Limits(train=batches * per_step),
        callbacks=Callbacks(PlainLines(train.log_step_freq, io.StringIO())),  # lines as in training, to nowhere
    )


def varied(task: Task, settings: Settings, candidate: Candidate | None) -> tuple[Task, Settings]:
    """Returns a task and settings with one change, or with none; the net and its weights are the same.

    Raises:
        UsageError: the loader cannot be changed so.
        Exception: whatever the optimizer raises that cannot be made so.
    """
    settings = _with_train(settings, cuda_graph=False)  # which has no parts that could be timed, and is tried
    if candidate is None:
        return task, settings
    if candidate.train:
        settings = _with_train(settings, **candidate.train)
    if candidate.loader:
        task = replace(task, dl_train=with_options(task.dl_train, **candidate.loader))
    if candidate.fused and task.optimizer is not None:
        fused = with_fused(task.optimizer)
        scheduler = copy.deepcopy(task.scheduler, {id(task.optimizer): fused})
        task = replace(task, optimizer=fused, scheduler=scheduler)
    return task, settings


def takes_fused(optimizer: Optimizer | None) -> str:
    """Returns the name of an optimizer's class where it takes fused=True and does not have it; else an empty text."""
    kind = type(optimizer)
    if optimizer is None or not kind.__module__.startswith("torch.optim") or kind.__name__ not in _FUSED:
        return ""
    has = any(group.get("fused") or group.get("differentiable") for group in optimizer.param_groups)
    return "" if has else kind.__name__


def with_fused(optimizer: Optimizer) -> Optimizer:
    """Returns an optimizer of the same class, groups and options, with fused=True and without a state."""
    kind = type(optimizer)
    known = inspect.signature(kind).parameters
    how = {"fused": True, "foreach": None}
    options = {name: value for name, value in optimizer.defaults.items() if name in known} | how
    groups = [{k: v for k, v in group.items() if k != "param_names"} | how for group in optimizer.param_groups]
    return kind(groups, **options)


def match_layout(optimizer: Optimizer | None) -> None:
    """Lays an optimizer's states out as its parameters, which may have come to be laid out otherwise."""
    for parameter, state in () if optimizer is None else optimizer.state.items():
        for name, value in state.items() if isinstance(state, dict) else ():
            same = isinstance(value, Tensor) and value.layout is torch.strided and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = _laid_out(value, parameter)


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    out = value.new_empty_strided(like.shape, like.stride())
    return out.copy_(value)
