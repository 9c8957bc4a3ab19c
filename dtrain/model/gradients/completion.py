"""A backward pass with DDP that leaves parameters out on one rank and not on others: conditional nets, experts.

DDP waits on every rank until all parameters have their gradients. A rank whose pass has ended and left some out brings
these as zeros, by a backward pass of its own, and so completes the average that the other ranks wait for::

    rank 0:  loss.backward()   a, b, c  ->  averaged with DDP
    rank 1:  loss.backward()   a, c     ->  says so in the store  ->  backward() of 0 * b  ->  averaged

By then all ranks that leave some out have said so. A parameter that no rank has used has no gradient, as in one
process; that can only be where all ranks have said so.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.distributed.standing import Whereabouts
from dtrain.distributed.world import World
from dtrain.errors import StepError

REMEDY = 'Set train.average=step (average="step" in Python), which supports it.'
_NUMBERS = itertools.count(1)  # of those that a process makes, the same on all ranks
_KEPT = 2  # of the last passes, what a slower rank may still read


class PassCompletion:
    """Completes the passes of one rank.

    Args:
        world: several ranks.

    Attributes:
        number: of the passes of one net or several, the same on all ranks.
        running: whether it brings zeros just now, which are no gradients of the train step's.
        done: whether it has completed a pass of this train step for ranks that had all gradients.
        at: where this rank stands, for those that wait for it elsewhere.
    """

    def __init__(self, world: World) -> None:
        self.number = next(_NUMBERS)
        self.at = Whereabouts(self.number)
        self.running = self.done = False
        self._world = world
        self._key = f"dtrain/lacks/{self.number}"
        self._passes = 0
        self._kept: deque[int] = deque()

    def begin(self, *, ddp: bool) -> None:
        """The net is called, or a gradient arrives: with DDP, this rank may wait for all ranks from here on."""
        if ddp and not self.at.inside:
            self.at.enter(computes=True)

    def passed(self) -> None:
        """A backward pass with DDP is over; all ranks have as many of them."""
        self._passes += 1
        Variable._execution_engine.queue_callback(self.at.leave)  # after DDP's own, which waits for all ranks

    def refuse_another(self) -> None:
        """A gradient arrives.

        Raises:
            StepError: in a train step of which other ranks may have gone on already.
        """
        if self.done:
            raise StepError(
                "a backward pass of this train step left out parameters that other ranks have used, so that they took "
                f"it for the step's only one, and another one follows. {REMEDY}"
            )

    def complete(self, parameters: Sequence[nn.Parameter], lacking: list[int], used: bytearray) -> bool:
        """Brings zeros for what this rank's last pass left out, and returns once all ranks' gradients are averaged.

        Args:
            parameters: all of them.
            lacking: the numbers of those that are trained and got no gradient in the pass.
            used: of each, whether it got one that is to be averaged; cleared where all ranks have left some out.

        Returns:
            whether all ranks have left some out, and so know it.
        """
        store = _get_default_store()
        own = f"{self._key}/{self._passes}/{self._world.rank}"
        store.set(own, used.hex())
        store.check([own])  # set() does not wait for the store: what another rank looks at next might be older
        self._forget(store)
        before = {number: parameters[number].grad for number in lacking}
        self.running = True
        try:
            with torch.enable_grad():
                torch.autograd.backward([_zero(parameters[number]) for number in lacking])
        finally:
            self.running = False
        if self._world.device.type != "cpu":
            torch.accelerator.synchronize()  # the average is there once the other ranks have brought theirs
        keys = [f"{self._key}/{self._passes}/{rank}" for rank in range(self._world.size)]
        self.done = not store.check(keys)
        if self.done:
            return False
        on_ranks = [bytes.fromhex(store.get(key).decode()) for key in keys]
        for number, gradient in before.items():
            if gradient is None and not any(rank[number] for rank in on_ranks):
                parameters[number].grad = None
        used[:] = bytes(len(used))
        return True

    def _forget(self, store: Any) -> None:
        """What this rank said of passes that all ranks have left behind is no longer kept."""
        self._kept.append(self._passes)
        while self._kept[0] <= self._passes - _KEPT:
            store.delete_key(f"{self._key}/{self._kept.popleft()}/{self._world.rank}")


def _zero(parameter: nn.Parameter) -> torch.Tensor:
    real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    return (real * 0).sum()
