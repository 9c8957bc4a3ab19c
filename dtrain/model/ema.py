"""An average of the weights, beside those that are trained: exponential (EMA), or of equal weights (SWA).

After each optimizer step, average = decay * average + (1 - decay) * weights; the first one is the weights after the
first step. Or, stochastic weight averaging (Izmailov et al. 2018): from some step on, the mean of the weights after
each step. The arithmetic is that of `torch.optim.swa_utils`, in float32 at least: a part 1 - decay of a difference is
less than bfloat16 and float16 can add. Buffers (BatchNorm's statistics) are the trained net's.

What is frozen has no average. A parameter that is unfrozen later joins with the value that it had until then, as if it
had been averaged from the beginning; one that is frozen later stays, and its average comes to its value.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from dtrain.distributed.dtensor import cut_like, is_sharded, local_part

_NARROW = (torch.bfloat16, torch.float16)


class WeightAverage:
    """The average of a net's trained parameters; it is the same on all ranks, since they are, or sharded as they are.

    Args:
        module: the net, on the rank's device.
        decay: above 0 and below 1; None for equal weights.
        after: optimizer steps of which none is taken in; until then the net's own weights stand for the average.

    Attributes:
        updates: optimizer steps so far.
        taken: those of them that were taken in.
        moved: whether the weights of the step that `update` will be told of were taken in already, by `move`.
    """

    def __init__(self, module: nn.Module, decay: float | None, after: int = 0) -> None:
        self.updates = self.taken = 0
        self.moved = False
        self._same = decay is not None  # whether each step is taken in alike
        self._after = after
        self._trained: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # the trained values, while the averaged ones are in the net
        self._move: Callable[..., None] = (
            get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        )
        self._frozen = dict(module.named_parameters())
        self._join()
        if self._frozen:
            # They may be unfrozen in the midst of a train step, and by the next update they have stepped.
            mine = weakref.ref(self)
            handle = register_optimizer_step_pre_hook(lambda *_: _before_step(mine))
            weakref.finalize(self, handle.remove)

    def update(self) -> None:
        """Takes the weights of one more optimizer step in."""
        if self._frozen:
            self._join()
        self.updates += 1
        if self.updates <= self._after:
            return
        if self.taken == 0:
            for name, parameter in self._trained.items():
                local_part(self._average[name]).copy_(local_part(parameter))
        elif self._trained and not self.moved:
            self.move()
        self.moved = False
        self.taken += 1

    @property
    def movable(self) -> bool:
        """Whether `move` does the same at each step from now on, so that a captured step can do it."""
        return self._same and self.taken > 0 and bool(self._trained) and not self._frozen

    def move(self) -> None:
        """Takes the weights in, before `update` is told of their step, which then only counts it."""
        averages = [local_part(average) for average in self._average.values()]
        weights = [local_part(parameter) for parameter in self._trained.values()]
        self._move(averages, [_like(w, a) for w, a in zip(weights, averages, strict=True)], self.taken)
        self.moved = True

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the net has the averaged weights, in its own type; then its own weights again."""
        self.settle()  # nothing, as long as there is no average
        try:
            yield
        finally:
            for name, own in self._own.items():
                _put(self._trained[name], own)
            self._own = {}

    def settle(self) -> None:
        """Leaves the averaged weights in the net, for good."""
        if not self._begun:
            return
        for name, parameter in self._trained.items():
            # Of a sharded one the memory is part of a larger one, so that its numbers are copied.
            self._own[name] = local_part(parameter).clone() if is_sharded(parameter) else parameter.data
            _put(parameter, local_part(self._average[name]))

    def weights(self) -> dict[str, Tensor]:
        """Returns the averaged parameters by name, where they are, in the types of the net's; none yet is nothing."""
        if not self._begun:
            return {}
        return {name: _like(average, self._trained[name]) for name, average in self._average.items()}

    def exact(self) -> dict[str, Tensor]:
        """Returns those of the averages, by name, that are of a wider type than the net's parameters."""
        if not self._begun:
            return {}
        return {name: a for name, a in self._average.items() if a.dtype != self._trained[name].dtype}

    def trained(self) -> dict[str, Tensor]:
        """Returns the trained parameters by name, where they are."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def take_up(
        self, trained: Mapping[str, Tensor], exact: Mapping[str, Tensor], updates: int, taken: int | None = None
    ) -> None:
        """Goes on from a net that was loaded with averaged weights.

        Args:
            trained: the parameters that have an average, by name: their trained values.
            exact: the averages that are of a wider type than the net's parameters, by name.
            updates: optimizer steps so far.
            taken: those of them that were taken in; None for all.
        """
        self._join(trained)
        for name, value in trained.items():
            parameter = self._trained[name]
            average = cut_like(exact[name], parameter) if name in exact else parameter
            local_part(self._average[name]).copy_(local_part(average))
            local_part(parameter).copy_(local_part(cut_like(value, parameter)))
        self.updates = updates
        # A run that is longer now averages later; what there was is no part of that.
        self.taken = (updates if taken is None else taken) if updates > self._after else 0

    @property
    def _begun(self) -> bool:
        """Whether there is an average."""
        return self._after == 0 or self.taken > 0

    def _join(self, names: Mapping[str, Any] | None = None) -> None:
        """Averages the parameters that are not frozen any longer, or the named ones, too, from their values now on."""
        new = [name for name, p in self._frozen.items() if p.requires_grad or (names is not None and name in names)]
        for name in new:
            parameter = self._trained[name] = self._frozen.pop(name)
            wide = torch.float32 if parameter.dtype in _NARROW else parameter.dtype
            self._average[name] = parameter.detach().to(wide, copy=True)


def _before_step(average: weakref.ref[WeightAverage]) -> None:
    known = average()
    if known is not None and known._frozen:
        known._join()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)


def _put(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter, or this rank's part of it, other numbers."""
    if is_sharded(parameter):
        local_part(parameter).copy_(value)
    else:
        parameter.data = _like(value, parameter)
