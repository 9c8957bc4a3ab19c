"""DistributedDataParallel behind the user's own net: the step gets the net itself, on any number of ranks.

DDP must see each forward pass, since that is where it makes ready to average the gradients. A wrapper in place
of the net would hide it: attributes, methods, `isinstance`, the names in `state_dict()`. So DDP wraps a small inner
module instead, and while a train step runs, a call of the net is led through DDP::

    net(x) -> net.forward, redirected -> DDP -> _Inner -> the net's own forward

A call without gradients goes past DDP, which would only have the ranks wait for each other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtrain.checks import word_in_terms_of_ranks
from dtrain.compiling import Compile, CompileClock, by_us_alone, compilation, compiled
from dtrain.precision import Precision, chosen, computing

if TYPE_CHECKING:
    from dtrain.world import World


class _Arrivals:
    """The order in which parameters get their gradients in the first backward pass.

    DDP lays the gradients out in that order from the second step on, and gloo, with more than two ranks, adds up
    in an order that depends on where a gradient lies. A resumed run whose layout differs in its first step would
    differ in the last bit.

    Attributes:
        order: numbers of the trained parameters; whole once all have come.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.order: list[int] = []
        self._handles = [
            _hooks(parameter).register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
            for number, parameter in enumerate(parameters)
        ]

    def _arrived(self, number: int) -> None:
        if number not in self.order:
            self.order.append(number)
        if len(self.order) == len(self._handles):
            self.close()

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        for handle in self._handles:
            handle.remove()


def _hooks(parameter: Any) -> Any:
    """A parameter whose methods torch has not typed."""
    return parameter


class _Inner(nn.Module):
    """What DDP wraps: the net's parameters and its own forward, without the net's hooks, which run outside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.own_forward = net.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the net's own forward."""
        return self.own_forward(*args, **kwargs)


def _placement() -> bool | None:
    """What Accelerate shall do about a net's device; None leaves it to Accelerate, which looks for DTensors first.

    To look, it imports what they are made of: half a second of a start. Where nobody has imported that, there are none.
    """
    return None if "torch.distributed.tensor" in sys.modules else True


class _Redirection:
    """Stands in for `net.forward` while a pass over the data runs.

    Attributes:
        modes: of the passes that are open, whether each leads calls through DDP; the last one counts.
        used: whether a call has gone through DDP.
    """

    def __init__(self, net: nn.Module, ddp: nn.Module, inner: nn.Module) -> None:
        self._net = net
        self.ddp: Any = ddp
        self.inner: Any = inner
        self._own = net.forward
        self._inside = False
        self.modes: list[bool] = []
        self.used = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # a net that calls itself
            return self._own(*args, **kwargs)
        averaged = self.modes[-1:] == [True] and torch.is_grad_enabled()
        self._inside = True
        self.used |= averaged
        try:
            return self.ddp(*args, **kwargs) if averaged else self.inner(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            word_in_terms_of_ranks(error, self._net)
            raise
        finally:
            self._inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the net that is made within a step (a weight average, say) runs its own forward."""
        copied = memo.get(id(self._net), self._net)
        return MethodType(type(self._net).forward, copied)

    def __reduce__(self) -> Any:
        """So does a net that is pickled within a step."""
        return getattr, (self._net, "forward")  # as a bound method is pickled; a new net has no redirection


class Replica:
    """One rank's copy of the net, with gradients that are averaged over the ranks.

    Args:
        net: the user's net; it is moved to the rank's device in place.
        world: the ranks.
        precision: in which its forward computes, in training and validation alike; by default that of Accelerate's
            settings.
        compile: whether, or in which mode of torch.compile, it is compiled; by default as Accelerate's settings say.

    Attributes:
        sharded: False; see `dtrain.fsdp.replica`.
        clock: tells how long compiling takes; None where nothing is compiled.
    """

    sharded = False

    def __init__(
        self, net: nn.Module, world: World, precision: Precision | None = None, compile: Compile | None = None
    ) -> None:
        self.net = net
        how = compilation(compile, world)
        self.clock = None if how is None else CompileClock()
        self._lowered = contextlib.ExitStack()
        self._lowered.enter_context(compiled(net, how))
        self._lowered.enter_context(computing(net, precision or chosen(None, world), world))
        self._before: Any = None
        self._redirection: _Redirection | None = None
        self._itself = contextlib.nullcontext(net)
        if world.size > 1 and any(parameter.requires_grad for parameter in net.parameters()):
            inner = _Inner(net)
            with by_us_alone(world):
                ddp = world.accelerator.prepare_model(inner, device_placement=_placement())
            if ddp.device_ids:  # the local rank, also where each rank sees one GPU, as with srun's --gpus-per-task
                ddp.device_ids, ddp.output_device = [world.device.index], world.device.index
            self._redirection = _Redirection(net, ddp, inner)
        world.accelerator._models.clear()  # nobody else's to keep alive
        self._trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._arrivals = _Arrivals(self._trained) if world.size > 2 and self._redirection is not None else None

    @property
    def layout(self) -> list[int]:
        """The order in which DDP lays the gradients out after the first step; empty where it does not matter."""
        return [] if self._arrivals is None else list(self._arrivals.order)

    def lay_out(self, order: list[int]) -> None:
        """Has DDP lay the gradients out as in the run that `layout` was taken from: by a backward pass of zeros."""
        if self._arrivals is None or self._redirection is None or sorted(order) != list(range(len(self._trained))):
            return
        before = [parameter.grad for parameter in self._trained]
        own = self._redirection.inner.own_forward

        def chain(zero: torch.Tensor) -> torch.Tensor:
            for number in reversed(order):  # backward goes through it from its end
                zero = zero + (self._trained[number] * 0).sum()
            return zero

        self._redirection.inner.own_forward = chain
        try:
            device = self._trained[0].device
            self._redirection.ddp(torch.zeros((), device=device)).backward()
        finally:
            self._redirection.inner.own_forward = own
        for parameter, grad in zip(self._trained, before, strict=True):
            parameter.grad = grad
        self._arrivals.order = order

    def close(self) -> None:
        """Lets go of DDP and gives the net back its own forward."""
        if self._arrivals is not None:
            self._arrivals.close()
        if self.clock is not None:
            self.clock.close()
        self._redirection = None
        self._lowered.close()

    @property
    def passed_by(self) -> bool:
        """Whether there are other ranks, and no call of the net so far whose gradients are averaged over them."""
        return self._redirection is not None and not self._redirection.used

    def leaves(self) -> Iterable[torch.Tensor]:
        """Returns the parameters, at which gradients arrive before they are averaged."""
        return self.net.parameters()

    def validating(self) -> AbstractContextManager[Any]:
        """While inside, validation runs: on the whole net, which each rank has anyway."""
        return self._itself

    def averaging(self, wanted: bool) -> AbstractContextManager[Any]:
        """While inside, backward averages the gradients over the ranks, or, if not wanted, adds them up here."""
        if wanted or self._redirection is None:
            return self._itself
        return self._redirection.ddp.no_sync()  # type: ignore[no-any-return]

    def training(self) -> AbstractContextManager[nn.Module]:
        """While inside, calls of the net go through DDP; outside, the net is as the user made it."""
        return self._itself if self._redirection is None else self._led(self._redirection, through_ddp=True)

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """While inside, also inside `training`, calls of the net go past DDP, in the run's precision."""
        return self._itself if self._redirection is None else self._led(self._redirection, through_ddp=False)

    @contextlib.contextmanager
    def _led(self, redirection: _Redirection, *, through_ddp: bool) -> Iterator[nn.Module]:
        if not redirection.modes:
            self._before = self.net.__dict__.get("forward")
            self.net.__dict__["forward"] = redirection
        redirection.modes.append(through_ddp)
        try:
            yield self.net
        finally:
            # Of two loops side by side the first may end first; which of two equal modes goes does not matter.
            position = len(redirection.modes) - 1 - redirection.modes[::-1].index(through_ddp)
            del redirection.modes[position]
            if not redirection.modes:
                del self.net.__dict__["forward"]
                if self._before is not None:
                    self.net.__dict__["forward"] = self._before
