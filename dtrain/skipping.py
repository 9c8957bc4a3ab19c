"""A train step that leaves a batch out by itself, on one of several ranks: the others wait for its gradients.

So the rank takes part in their backward pass with zeros. What comes back tells whether the others have left theirs out
as well, which is all right, or whether they learn from theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtrain.ddp import Replica
from dtrain.errors import StepError
from dtrain.fsdp.replica import ShardedReplica

_LEFT_OUT = (
    "the train step left this rank's batch out, by neither calling backward() nor optimizer.step(), and {}. Return the "
    "loss, as dtrain.Mean(0 * total, 0) for a batch that is to be left out, and leave backward, step and zero_grad to "
    "dtrain."
)


class CallsOfNet:
    """Tells whether a call of the net since the last look is one whose gradients are averaged over the ranks."""

    def __init__(self, replica: Replica | ShardedReplica) -> None:
        self._redirection: Any = getattr(replica, "_redirection", None)
        self._ever = False

    def begin(self) -> None:
        """A train step begins."""
        if self._redirection is not None:
            self._ever = self._redirection.used
            self._redirection.used = False

    def end(self) -> bool:
        """A train step is over: returns whether there was such a call."""
        if self._redirection is None:
            return False
        called = bool(self._redirection.used)
        self._redirection.used = called or self._ever
        return called


def take_part(replica: Replica | ShardedReplica, *, called: bool) -> None:
    """Takes part in a backward pass of the other ranks, as one whose batch is left out; the gradients stay as they are.

    Args:
        replica: the net's, on one of several ranks.
        called: whether the net was called, with gradients, before the batch was left out.

    Raises:
        StepError: the other ranks learn from this batch.
    """
    if isinstance(replica, ShardedReplica):
        raise StepError(_LEFT_OUT.format("with train.shard every rank must take part in every step"))
    redirection: Any = replica._redirection
    if redirection is None:
        return
    parameters = [parameter for parameter in replica.net.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    def zeros(zero: Tensor) -> Tensor:
        for parameter in parameters:
            zero = zero + (parameter * 0).sum()
        return zero

    zero = torch.zeros((), device=parameters[0].device)
    own = redirection.inner.own_forward
    try:
        if called:
            torch.autograd.backward(zeros(zero))
        else:
            redirection.inner.own_forward = zeros
            redirection.ddp(zero).backward()
    finally:
        redirection.inner.own_forward = own
    others_learn = any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    if others_learn:
        raise StepError(_LEFT_OUT.format("other ranks learn from theirs"))
