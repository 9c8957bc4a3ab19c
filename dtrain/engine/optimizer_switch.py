"""The optimizer that a run steps is `model.optimizer`, also where a step or a callback puts another one there."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from dtrain.distributed.consistency import check_optimizers
from dtrain.errors import StepError
from dtrain.model.optimizers import place_states

if TYPE_CHECKING:
    from dtrain.engine.train_step import Task


def follow(task: Task, size: int) -> None:
    """Makes what has become `model.optimizer` the task's optimizer.

    Args:
        task: its optimizer is set.
        size: the number of ranks.

    Raises:
        StepError: it is no optimizer, holds the wrong parameters, or the scheduler changes the rates of the one before.
    """
    found = task.module.__dict__.get("optimizer", task.optimizer)
    if found is task.optimizer or found is None:
        return
    if not is_optimizer(found):
        if task.keeps_others:
            return
        raise StepError(
            f"model.optimizer was set to {type(found).__name__}, which is not an optimizer. Use another attribute name."
        )
    before, scheduler = task.optimizer, task.scheduler
    if before is not None and getattr(scheduler, "optimizer", None) is before:
        raise StepError(
            f"model.optimizer was replaced (by {type(found).__name__}), and the scheduler "
            f"({type(scheduler).__name__}) still sets the learning rates of the previous one "
            f"({type(before).__name__}). Remove the schedule (build_scheduler, train.schedule) and "
            "set the learning rates where you replace the optimizer; or keep one "
            "optimizer, and change the options of its groups."
        )
    check_optimizers([found], task.module, size)
    place_states(task.module, [found])
    task.optimizer = found


def is_optimizer(found: object) -> bool:
    """Whether it is one of torch's optimizers, or has what a run needs of one."""
    return hasattr(found, "param_groups") and hasattr(found, "state")


def no_optimizer(module: nn.Module) -> StepError:
    """Returns the error for a train step that leaves the optimizer's step to dtrain, which knows no optimizer."""
    found = getattr(module, "optimizer", None)
    if found is None:
        return StepError(
            "the train step returns a loss with its graph, but there is no optimizer. "
            "Define build_optimizer(model), or set model.optimizer."
        )
    return StepError(
        f"the train step returns a loss with its graph, for dtrain to step on, and model.optimizer "
        f"({type(found).__name__}) is not a torch.optim.Optimizer. Have it inherit from that; or call zero_grad(), "
        "loss.backward() and its step() in the train step, and return loss.detach()."
    )


def check_without_closure(optimizer: Optimizer | None) -> None:
    """Finds, before its first step, an optimizer that dtrain cannot step.

    Raises:
        StepError: it must be given a closure.
    """
    if optimizer is None:
        return
    given = inspect.signature(type(optimizer).step).parameters.get("closure")
    if given is None or given.default is not inspect.Parameter.empty:
        return
    raise StepError(
        f"{type(optimizer).__name__} needs a closure that computes the loss again, and a train step that returns "
        "the loss gives none. Call it in the train step: def closure(): model.optimizer.zero_grad(); "
        "loss = ...; loss.backward(); return loss. Then loss = model.optimizer.step(closure), and return loss.detach()."
    )
