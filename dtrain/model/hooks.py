"""Hooks on parameters, also on frozen ones, which may be unfrozen while the hook is there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

logger = logging.getLogger(__name__)


class _Arrival:
    """Handle of a function that changes what arrives at a parameter, after the user's own hooks."""

    def __init__(self, parameter: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        trained = parameter.requires_grad
        parameter.requires_grad_(True)
        self._node: Any = get_gradient_edge(parameter).node  # which lives as long as somebody keeps it
        parameter.requires_grad_(trained)
        self._handle = self._node.register_prehook(
            lambda gradients: tuple(None if one is None else function(one) for one in gradients)
        )

    def remove(self) -> None:
        """Gradients arrive as they are."""
        self._handle.remove()


def hook_gradient(parameter: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
    """Has a function change every gradient on its way into `parameter.grad`, not what `torch.autograd.grad` returns.

    Returns:
        a handle with `remove()`.
    """
    return _Arrival(parameter, function)


def scaled(gradient: Tensor, scale: float) -> Tensor:
    """Returns a gradient times a number; its graph, where it has one (`create_graph=True`), is the gradient's alone.

    What is computed from it comes to the parameter itself later, and is multiplied then.
    """
    if not gradient.requires_grad:
        return gradient * scale
    return gradient + gradient.detach() * (scale - 1.0)


def hook_accumulated(parameter: Tensor, function: Callable[[Tensor], None]) -> Any:
    """Has a function called with the parameter after each gradient that was added to `parameter.grad`.

    Returns:
        a handle with `remove()`.
    """
    return _registered(parameter, "register_post_accumulate_grad_hook", function)


def _registered(parameter: Any, method: str, function: Callable[..., Any]) -> Any:
    """torch takes hooks for tensors that need a gradient alone, and keeps them for when these need one again."""
    trained = parameter.requires_grad
    if trained:
        return getattr(parameter, method)(function)
    parameter.requires_grad_(True)
    try:
        return getattr(parameter, method)(function)
    finally:
        parameter.requires_grad_(False)


def can_learn(parameter: Tensor) -> bool:
    """Whether a parameter can have a gradient: of integers there is none."""
    return parameter.is_floating_point() or parameter.is_complex()


def warn_of_gradient_hooks(net: nn.Module) -> None:
    """Warns of the user's own hooks on gradients, which with `average="ddp"` see each rank's part of the batch alone.

    Args:
        net: before dtrain has hooked anything to it.
    """
    hooked = [name for name, parameter in net.named_parameters() if parameter._backward_hooks]
    if hooked:
        logger.warning(
            "%s%s has a gradient hook (register_hook): with train.average=ddp it gets each rank's own gradient, before "
            "the average. Scaling is fine, but clipping or normalizing is not: use train.average=auto, which calls "
            "hooks with the averaged gradient.",
            hooked[0],
            f" (and {len(hooked) - 1} more)" if len(hooked) > 1 else "",
        )
