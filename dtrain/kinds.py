"""What one kind of train step or one way of making a net cannot have: refused, with what to do about it."""

from __future__ import annotations

from typing import Any

from torch import nn

from dtrain.errors import StepError, UsageError
from dtrain.metrics import Mean, Value


def refuse_loss_as_layer(module: nn.Module) -> None:
    """Refuses an nn.Sequential that took a loss or metric for one more of its layers, which it would run after them."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return
    for name in ("loss_func", "loss_fn", "metric_func", "metric_fn", "metrics"):
        child = dict(module.named_children()).get(name)
        if child is not None:
            kind = type(child).__name__
            raise UsageError(
                f"model.{name} = {kind}(...) makes it a layer of the net: that is an nn.Sequential, which would run it "
                f"after the others. Keep it apart, as in {name} = {kind}(...) and {name}(predictions, labels) in the "
                f"steps; or give model.{name} a plain function, such as one of torch.nn.functional; or make the net a "
                "class of its own, an nn.Module with a forward."
            )


def refuse_scaling(scaler: Any) -> None:
    """Refuses float16 for an imperative step.

    Args:
        scaler: of the losses; None with another precision.
    """
    if scaler is not None:
        raise UsageError(
            "precision fp16: the train step calls backward() itself, so that dtrain cannot scale its loss, without "
            "which small gradients vanish. Return the loss and leave the rest to dtrain, or use bf16."
        )


def refuse_weights(loss: Value | None, *, several: bool) -> None:
    """Refuses an imperative step whose loss has a weight of its own, which its gradient cannot be given.

    Args:
        loss: what it returned.
        several: whether its gradient is added to others: on several ranks, or with accumulation.
    """
    if several and isinstance(loss, Mean):
        raise StepError(
            "the train step calls backward() itself and returns its loss as dtrain.Mean: on several ranks or with "
            "accumulation its gradient cannot be given that weight. Return the Mean with its graph and leave "
            "backward, step and zero_grad to dtrain."
        )


def check_planned(planned: str, taken: int, *, came: bool) -> None:
    """Finds an imperative step that accumulates by itself, or steps several times, where the number must be known.

    Args:
        planned: what rests on one optimizer step for each batch, in words.
        taken: the optimizer steps for the last batch.
        came: whether gradients came for it.

    Raises:
        StepError: it learns from the batch, and took none or several.
    """
    if taken == 1 or (taken == 0 and not came):
        return
    raise StepError(
        f"{planned} needs to know the number of the run's optimizer steps, one for each batch, "
        f"and the train step took {taken or 'none'} for this one. Let dtrain accumulate (train.accumulation=2, and one "
        "optimizer.step() in each train step), or return a scheduler of your own from "
        'build_scheduler(optimizer), as (scheduler, "step").'
    )
