"""What one kind of train step or one way of making a net cannot have: refused, with what to do about it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dtrain.engine.metrics import Mean, Value
from dtrain.errors import StepError, UsageError

_MOST_NODES = 1000  # of a graph that are looked at


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
                f"after the others. Keep it separate, as in {name} = {kind}(...) and "
                f"{name}(predictions, labels) in the "
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
            "precision fp16: the train step calls backward() itself, so dtrain cannot scale its loss, without which "
            "small gradients underflow. Return the loss and leave the rest to dtrain, or use bf16."
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
        "optimizer.step() in each train step), or return your own scheduler from "
        'build_scheduler(optimizer), as (scheduler, "step").'
    )


def refuse_unused_loss(loss: Value | None) -> None:
    """Refuses a loss with a graph on which nobody called backward, from a step that calls backward and step itself.

    Args:
        loss: what an imperative step returned for a batch on which it did not step the task's optimizer.
    """
    total = loss.total if isinstance(loss, Mean) else loss
    # One that is not finite is what steps leave out on purpose.
    if isinstance(total, Tensor) and total.requires_grad and _is_whole(total) and bool(total.isfinite()):
        raise StepError(
            "the train step returned a loss with its graph, on which backward() was not called, and did not step "
            "model.optimizer. It called backward() or an optimizer's step() itself before, so dtrain leaves both to "
            "it, and this loss would not train anything. Call loss.backward() and step() for every loss in "
            "the step; or return the loss of every batch and leave both to dtrain. Return a value that is only logged "
            "as loss.detach()."
        )


def _is_whole(loss: Tensor) -> bool:
    """Whether a graph still has what it saved for a backward pass; not where it never saved anything."""
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    saved = False
    while nodes and len(seen) < _MOST_NODES:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node)
        names = [name[4:] for name in dir(kind) if name.startswith("_raw_saved_")]
        for name in names or (["saved_tensors"] if hasattr(kind, "saved_tensors") else []):
            try:
                value = getattr(node, name)
            except RuntimeError:  # as torch says that it was freed by a backward pass
                return False
            saved = saved or isinstance(value, Tensor) or (isinstance(value, tuple) and len(value) > 0)
        nodes += [following for following, _ in node.next_functions]
    return saved


def changed_kind() -> StepError:
    """Returns the error for a step that steps the task's optimizer, after it had left that to dtrain."""
    return StepError(
        "the train step called model.optimizer.step() itself for this batch, but returned its loss for dtrain to do so "
        "before. " + _ALWAYS
    )


_ALWAYS = (
    "For every batch do the same: call zero_grad(), backward() and step() in the train step, or return the loss with "
    "its graph and leave these to dtrain."
)
