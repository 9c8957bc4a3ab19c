"""Learning-rate schedules by name: a warm-up, then constant, linear or cosine to the end of the run.

A schedule is a factor of the optimizer's own rate and counts optimizer steps, so that it is the same on any number of
ranks. Step s of T, with W of warm-up: (s + 1) / W while s < W; then, with p = (s - W) / (T - W), 1 (constant), 1 - p
(linear) or (1 + cos(pi p)) / 2 (cosine; Loshchilov and Hutter, 2017, without restarts), drawn between 1 and the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch.optim.lr_scheduler import LambdaLR

from dtrain.config.schema import TrainConfig
from dtrain.engine import Engine
from dtrain.errors import UsageError

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
            f"{what}, and the recipe has a scheduler ({type(task.scheduler).__name__}). Leave one of them out."
        )
    if task.optimizer is None:
        raise UsageError(f"{what} needs an optimizer that dtrain knows: build_optimizer(model), or model.optimizer.")
    total = engine.updates_in_all()
    if total is None:
        raise UsageError(f"{what}: the training loader has no length, so that its end cannot be known.")
    # A function, not an object: it counts by the config, and not by a checkpoint's, which may have had fewer epochs.
    task.scheduler = LambdaLR(
        task.optimizer, factor(train.schedule, total, _warmup(train, total, engine.epochs), train.floor)
    )
    task.interval = "step"
    if train.schedule != "constant" or (train.warmup_steps is None and _warmup(train, total, engine.epochs)):
        engine.learner.planned = what


def _warmup(train: TrainConfig, total: int, epochs: int) -> int:
    if train.warmup_steps is not None:
        return train.warmup_steps
    if train.warmup_epochs is not None:
        return round(train.warmup_epochs * total / epochs)
    return round((train.warmup_fraction or 0.0) * total)
