"""Learning-rate schedules by name: a warm-up, then constant, linear or cosine to the end of the run.

A schedule is a factor of the optimizer's own rate and counts optimizer steps, so that it is the same on any number of
ranks. Step s of T, with W of warm-up: (s + 1) / W while s < W; then, with p = (s - W) / (T - W), 1 (constant), 1 - p
(linear) or (1 + cos(pi p)) / 2 (cosine; Loshchilov and Hutter, 2017, without restarts), drawn between 1 and the floor.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, OneCycleLR, SequentialLR

from dtrain.config.schema import TrainConfig
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.step_contract import Kind
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

Shape = Literal["constant", "linear", "cosine"]


def factor(shape: Shape, total: int, warmup: int = 0, floor: float = 0.0) -> Callable[[int], float]:
    """Returns step -> the factor of the learning rate.

    Args:
        shape: of what comes after the warm-up.
        total: optimizer steps of the whole run.
        warmup: optimizer steps of it that are the warm-up.
        floor: the factor that linear and cosine go down to.
    """

    def of_step(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = min(1.0, (step - warmup) / max(1, total - warmup))
        if shape == "constant":
            return 1.0
        left = 1.0 - part if shape == "linear" else (1.0 + math.cos(math.pi * part)) / 2
        return floor + (1.0 - floor) * left

    return of_step


def follow_schedule(engine: Engine, train: TrainConfig) -> None:
    """Gives an engine's optimizer the schedule that the config names, if it does.

    Args:
        engine: it has not trained yet.
        train: the config's section.

    Raises:
        UsageError: there is no optimizer, another schedule, or no telling how long the run is.
    """
    if train.schedule is None:
        return
    task, what = engine.task, f"train.schedule = {train.schedule}"
    if task.scheduler is not None:
        raise UsageError(
            f"{what}, and the recipe has a scheduler ({type(task.scheduler).__name__}). Use only one of them."
        )
    if task.optimizer is None:
        raise UsageError(f"{what} needs an optimizer: define build_optimizer(model), or set model.optimizer.")
    total = engine.updates_in_all()
    if total is None:
        if train.schedule != "constant" or train.warmup_epochs is not None or train.warmup_fraction is not None:
            raise UsageError(
                f"{what}: the training loader has no length, so the end of the "
                "schedule is unknown. Set train.max_steps, "
                "or define the loader's __len__."
            )
        total = 0  # for nothing
    # A function, not an object: it counts by the config, and not by a checkpoint's, which may have had fewer epochs.
    of_step = factor(train.schedule, total, _warmup(train, total, engine.epochs), train.min_lr_ratio)
    if engine.world.is_main and train.schedule != "constant":
        of_step = _warn_when_over(of_step, total, what)
    task.scheduler = LambdaLR(task.optimizer, of_step)
    task.interval = "step"
    if train.schedule != "constant" or (train.warmup_steps is None and _warmup(train, total, engine.epochs)):
        engine.learner.planned = what


def _warn_when_over(of_step: Callable[[int], float], total: int, what: str) -> Callable[[int], float]:
    """Warns once where there are more steps than the loader's length said."""
    told = False

    def watched(step: int) -> float:
        nonlocal told
        if step > total and not told:
            told = True
            logger.warning(
                "%s ended after %d optimizer steps, as many as the training loader's length gave at the start; the run "
                "has more, at the last learning rate. Set train.max_steps, or make len(dataset) correct for each epoch "
                "after set_epoch(epoch).",
                what,
                total,
            )
        return of_step(step)

    return watched


def _warmup(train: TrainConfig, total: int, epochs: int) -> int:
    if train.warmup_steps is not None:
        return train.warmup_steps
    if train.warmup_epochs is not None:
        return round(train.warmup_epochs * total / epochs)
    return round((train.warmup_fraction or 0.0) * total)


def check_total_steps(engine: Engine) -> None:
    """Looks whether a schedule with a fixed number of steps lasts for the whole run.

    How many optimizer steps there are is known for a train step that returns its loss: one for each batch, or group of
    them. One that steps itself may take fewer; then it is a warning. It is looked at once the kind is known, before the
    first optimizer step that is dtrain's to take.

    Args:
        engine: it has not trained yet, and was put to where the run was, whose schedule it has.

    Raises:
        UsageError: torch's OneCycleLR would raise in the midst of training. Where it counts optimizer steps, the engine
            raises it.
    """
    task = engine.task
    if not has_end(task.scheduler):
        return
    needed = engine.epochs if task.interval == "epoch" else engine.updates_in_all()
    for scheduler, steps in () if needed is None else _limited(task.scheduler, needed):
        if steps <= scheduler.total_steps:
            continue
        text = _too_short(engine, scheduler, steps)
        if task.interval == "epoch" and isinstance(scheduler, OneCycleLR):
            raise UsageError(text, on_all_ranks=True)
        if isinstance(scheduler, OneCycleLR):
            engine.callbacks.add(_TooShort(text, is_main=engine.world.is_main))
        elif engine.world.is_main:
            logger.warning("%s", text)
        return


def has_end(scheduler: Any) -> bool:
    """Whether a schedule has a number of steps, after which there are no more of it."""
    return any(True for _ in _limited(scheduler, 0))


def _limited(scheduler: Any, needed: int) -> Iterator[tuple[Any, int]]:
    """Yields the schedulers that have a number of steps, each with the steps that it is to take."""
    if isinstance(scheduler, SequentialLR):
        starts = [0, *scheduler._milestones]
        ends = [*(min(needed, end - 1) for end in scheduler._milestones), needed]
        for one, start, end in zip(scheduler._schedulers, starts, ends, strict=False):
            yield from _limited(one, max(0, end - start))
    elif isinstance(scheduler, ChainedScheduler):
        for one in scheduler._schedulers:
            yield from _limited(one, needed)
    elif isinstance(getattr(scheduler, "total_steps", None), int):
        yield scheduler, needed


class _TooShort(EngineCallback):
    """Tells of a schedule that ends before the run, once the kind of the train step is known."""

    order = Order.CHECKS

    def __init__(self, text: str, *, is_main: bool) -> None:
        self._text, self._is_main = text, is_main

    def on_step_kind(self, kind: Kind) -> None:
        """A step that returns its loss has one optimizer step for each batch, or group of them.

        Raises:
            UsageError: it is of that kind.
        """
        if kind == "declarative":
            raise UsageError(self._text, on_all_ranks=True)
        if self._is_main:
            logger.warning(
                "%s If the train step takes fewer steps than it gets batches, this may be intended.", self._text
            )


def _too_short(engine: Engine, scheduler: Any, needed: int) -> str:
    by_epochs, total = engine.task.interval == "epoch", scheduler.total_steps
    what = "epochs" if by_epochs else "optimizer steps"
    fits = total if by_epochs else _epochs_within(engine, total)
    fewer = f"train {fits} epoch{'s' * (fits != 1)} (train.epochs={fits})" if fits else "train fewer steps"
    text = (
        f"the scheduler ({type(scheduler).__name__}) is built for {total} {what} "
        f"(total_steps), but the run has {needed}."
    )
    if engine.place.updates:
        return (
            f"{text} The schedule of a run cannot be extended after its start: {fewer}, or start a new run (another "
            f"run.name) with total_steps={needed}."
        )
    return f"{text} Make it with total_steps={needed}, or {fewer}."


def _epochs_within(engine: Engine, total: int) -> int:
    """Returns how many epochs so many optimizer steps are enough for."""
    steps = engine.train_loader.steps_of_epochs(engine.epochs) or []
    taken = itertools.accumulate(-(-number // engine.options.accumulation) for number in steps)
    return sum(1 for number in taken if number <= total)
