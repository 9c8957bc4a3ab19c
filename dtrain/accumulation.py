"""Gradient accumulation for imperative steps: no optimizer step and no cleared gradient in the midst of a group.

The groups and their weights are made by `dtrain.sharding`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.dealing import Share
from dtrain.errors import StepError


class HeldBack:
    """Keeps an imperative step from stepping and from clearing gradients in the midst of a group.

    Args:
        optimizer: the optimizer that the step is expected to use.
        net: the net, whose own `zero_grad` counts as well.

    Attributes:
        asked: whether the step called `optimizer.step()`, held back or not.
    """

    def __init__(self, optimizer: Optimizer | None, net: nn.Module) -> None:
        if optimizer is None:
            raise StepError(
                "train.accumulation needs to know the optimizer: define build_optimizer(model), or set model.optimizer."
            )
        self._optimizer = optimizer
        self._net = net
        self.asked = False

    @contextlib.contextmanager
    def __call__(self, share: Share) -> Iterator[None]:
        """Holds back for one micro-batch what its place in the group does not allow."""
        if share.first:
            # Once for the whole group, since a step may clear before backward or after its own step.
            self._optimizer.zero_grad()
            self._net.zero_grad()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(self._optimizer, "zero_grad", _nothing))
            stack.enter_context(_replaced(self._net, "zero_grad", _nothing))
            if not share.last:
                stack.enter_context(_replaced(self._optimizer, "step", self._note))
            yield

    def _note(self, *_: Any, **__: Any) -> None:
        self.asked = True


def _nothing(*_: Any, **__: Any) -> None:
    """Does nothing, in the place of zero_grad()."""


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Puts a function in the place of a method of one object; a scheduler may have done so before."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = function
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before
