"""Clipping of gradients, by norm and by value, right before an optimizer steps: whoever calls its `step()`.

By then the gradients are those of the whole global batch: averaged over the ranks, summed over accumulated batches.
So the norm is that of one process with the same global batch, and every rank clips alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass(frozen=True)
class Limit:
    """How long a gradient may be.

    Attributes:
        norm: the largest 2-norm of all gradients of an optimizer together; None for any.
        value: the largest magnitude of each number of them, applied first; None for any.
    """

    norm: float | None = None
    value: float | None = None

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self.norm is not None or self.value is not None


UNLIMITED = Limit()


class Clipping:
    """Clips the gradients of every optimizer that steps on some of these parameters, until it is closed.

    Args:
        limit: how much is let through.
        parameters: the net's.
    """

    def __init__(self, limit: Limit, parameters: Iterable[Tensor]) -> None:
        self._limit = limit
        self._own = {id(parameter) for parameter in parameters}
        self._handle = register_optimizer_step_pre_hook(self._clip)

    def _clip(self, optimizer: Optimizer, *_: Any) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(id(parameter) in self._own for parameter in held):
            return  # somebody else's
        sparse = any(parameter.grad is not None and parameter.grad.is_sparse for parameter in held)
        if self._limit.value is not None:
            (_clip_values if sparse else clip_grad_value_)(held, self._limit.value)
        if self._limit.norm is not None:
            (_clip_norm if sparse else clip_grad_norm_)(held, self._limit.norm)

    def close(self) -> None:
        """Clips no more; closing twice does no harm."""
        self._handle.remove()


def _clip_values(parameters: Iterable[Tensor], limit: float) -> None:
    clip_grad_value_(_values(parameters), limit)


def _clip_norm(parameters: Iterable[Tensor], limit: float) -> None:
    clip_grad_norm_(_values(parameters), limit)


def _values(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns stand-ins whose dense gradients share memory with the parameters' own.

    Of a sparse gradient these are its values, once those of the same index were added up: what it has no values for is
    zero, which is neither clipped nor counts in a norm.
    """
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        grad = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
        stand_in = torch.empty_like(grad)
        stand_in.grad = grad
        found.append(stand_in)
    return found
