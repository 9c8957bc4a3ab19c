"""Hooks on parameters, also on frozen ones, which may be unfrozen while the hook is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def hook_gradient(parameter: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
    """Has a function change every gradient on its way into `parameter.grad`.

    Returns:
        a handle with `remove()`.
    """
    return _registered(parameter, "register_hook", function)


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
