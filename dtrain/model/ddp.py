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

from dtrain.distributed.consistency import word_in_terms_of_ranks
from dtrain.distributed.seeding import load_random_state, random_state
from dtrain.model.compile import Compile, CompileClock, by_us_alone, compilation, compiled
from dtrain.model.gradients.averaging import GradientAveraging, Way
from dtrain.model.hooks import hook_accumulated
from dtrain.model.precision import Precision, chosen, computing

if TYPE_CHECKING:
    from dtrain.data.partition import RankBatch
    from dtrain.distributed.world import World


class _GradientOrder:
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
            hook_accumulated(parameter, lambda _, number=number: self._arrived(number))  # type: ignore[misc]
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


class _Inner(nn.Module):
    """What DDP wraps: the net's parameters and its own forward, without the net's hooks, which run outside."""

    def __init__(self, net: nn.Module, own_forward: Any) -> None:
        super().__init__()
        self.net = net
        self.own_forward = own_forward
        sparse = [name for name, one in self.named_buffers() if one.layout is not torch.strided]
        self._ddp_params_and_buffers_to_ignore = sparse  # which DDP cannot send

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
        ddp: what leads calls through DDP; None where the gradients are averaged otherwise.
        own: the net's own forward.
        modes: of the passes that are open, whether each is one of training; the last one counts.
    """

    def __init__(self, net: nn.Module, averaging: GradientAveraging) -> None:
        self._net = net
        self._averaging = averaging
        self.own = net.forward
        self._inside = False
        self.ddp: Any = None
        self.modes: list[bool] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # a net that calls itself
            return self.own(*args, **kwargs)
        learns = self.modes[-1:] == [True] and torch.is_grad_enabled()
        through_ddp = learns and self._averaging.called() and self.ddp is not None
        self._inside = True
        try:
            return self.ddp(*args, **kwargs) if through_ddp else self.own(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            word_in_terms_of_ranks(error)
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
        net: the user's net; it is moved to the rank's device in place, and gets rank 0's weights.
        world: the ranks.
        precision: in which its forward computes, in training and validation alike; by default that of Accelerate's
            settings.
        compile: whether, or in which mode of torch.compile, it is compiled; by default as Accelerate's settings say.
        averaging: how the gradients are averaged: a way, or what averages those of other nets too.

    Attributes:
        sharded: False; see `dtrain.model.fsdp`.
        clock: tells how long compiling takes; None where nothing is compiled.
        gradients: what averages them; None on one rank.
    """

    sharded = False

    def __init__(
        self,
        net: nn.Module,
        world: World,
        precision: Precision | None = None,
        compile: Compile | None = None,
        averaging: Way | GradientAveraging = "auto",
    ) -> None:
        self.net = net
        how = compilation(compile, world)
        self.clock = None if how is None else CompileClock()
        self._world = world
        self._before: Any = None
        self._redirection: _Redirection | None = None
        self._trained: list[nn.Parameter] = []
        self._arrivals: _GradientOrder | None = None
        self._itself = contextlib.nullcontext(net)
        self.gradients: GradientAveraging | None = None
        self._own_gradients = isinstance(averaging, str)
        self._lowered = contextlib.ExitStack()
        self._lowered.enter_context(compiled(net, how))
        self._lowered.enter_context(computing(net, precision or chosen(None, world), world))
        if world.size > 1:
            self.gradients = GradientAveraging(world, averaging) if isinstance(averaging, str) else averaging
            world.broadcast_([_real(tensor) for tensor in (*net.parameters(), *net.buffers())])
            self._redirection = _Redirection(net, self.gradients)
            self.gradients.add(self)

    # --- DDP ------------------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether a pass that trains it is open."""
        return self._redirection is not None and any(self._redirection.modes)

    def with_ddp(self) -> None:
        """Has DDP average the gradients of calls of the net from now on; on all ranks."""
        if self._redirection is None:
            return
        with by_us_alone(self._world):
            inner = _Inner(self.net, self._redirection.own)
            ddp = self._world.accelerator.prepare_model(inner, device_placement=_placement())
        if ddp.device_ids:  # the local rank, also where each rank sees one GPU, as with srun's --gpus-per-task
            ddp.device_ids, ddp.output_device = [self._world.device.index], self._world.device.index
        self._world.accelerator._models.clear()  # nobody else's to keep alive
        self._redirection.ddp = ddp
        self._trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self._arrivals = _GradientOrder(self._trained) if self._world.size > 2 else None

    def without_ddp(self) -> Any:
        """Has DDP average no more, and returns it; it must outlive the backward pass that runs."""
        if self._arrivals is not None:
            self._arrivals.close()
        self._arrivals = None
        if self._redirection is None or self._redirection.ddp is None:
            return None
        ddp, self._redirection.ddp = self._redirection.ddp, None
        ddp._remove_autograd_hooks()
        return ddp

    @property
    def averages(self) -> dict[str, Any]:
        """How the gradients are averaged, for a resumed run to be the same to the last bit.

        The order is that in which DDP lays them out after its first step; empty where it does not matter.
        """
        return {
            "way": None if self.gradients is None else self.gradients.mode,
            "order": [] if self._arrivals is None else list(self._arrivals.order),
        }

    def resume(self, averages: dict[str, Any]) -> None:
        """Has the gradients averaged as in the run that `averages` was taken from; on all ranks."""
        if self.gradients is not None:
            self.gradients.resume(averages["way"])
            self._set_gradient_bucket_order(averages["order"])

    def _set_gradient_bucket_order(self, order: list[int]) -> None:
        """Has DDP lay the gradients out in an order: by a backward pass of zeros."""
        if self._arrivals is None or self._redirection is None or sorted(order) != list(range(len(self._trained))):
            return
        before = [parameter.grad for parameter in self._trained]
        inner = self._redirection.ddp.module
        own = inner.own_forward

        def chain(zero: torch.Tensor) -> torch.Tensor:
            for number in reversed(order):  # backward goes through it from its end
                zero = zero + (_real(self._trained[number]) * 0).sum()
            return zero

        inner.own_forward = chain
        try:
            device = self._trained[0].device
            self._redirection.ddp(torch.zeros((), device=device)).backward()
        finally:
            inner.own_forward = own
        for parameter, grad in zip(self._trained, before, strict=True):
            parameter.grad = grad
        self._arrivals.order = order

    def close(self) -> None:
        """Lets go of DDP and gives the net back its own forward."""
        self.without_ddp()
        if self.gradients is not None and self._own_gradients:
            self.gradients.close()
        if self.clock is not None:
            self.clock.close()
        self._redirection = None
        self._lowered.close()

    # --- passes over the data -------------------------------------------------------------------------------

    def leaves(self) -> Iterable[torch.Tensor]:
        """Returns the parameters, at which gradients arrive before they are averaged."""
        return self.net.parameters()

    def validating(self) -> AbstractContextManager[Any]:
        """While inside, validation runs: on the whole net, which each rank has anyway."""
        return self._itself

    def averaging(self, rank_batch: RankBatch) -> AbstractContextManager[Any]:
        """While inside, a micro-batch is trained on; what the gradients of its group come to is averaged."""
        return self._itself if self.gradients is None else self._averaged(self.gradients, rank_batch)

    @contextlib.contextmanager
    def _averaged(self, gradients: GradientAveraging, rank_batch: RankBatch) -> Iterator[None]:
        token = gradients.begin(rank_batch.scale, last=rank_batch.last)
        ddp = None if self._redirection is None else self._redirection.ddp
        try:
            kept = contextlib.nullcontext() if rank_batch.count else _without_trace(self.net, self._world)
            with kept, contextlib.nullcontext() if rank_batch.last or ddp is None else ddp.no_sync():
                yield
        except BaseException as error:
            gradients.abandon()
            word_in_terms_of_ranks(error)
            raise
        gradients.end(token)

    def settle(self, *, strict: bool = False) -> None:
        """Once a train step's backward passes are done: returns when those of all ranks are, and averaged."""
        if self.gradients is not None:
            self.gradients.settle(strict=strict)

    def compare(self) -> None:
        """Compares the ranks' weights, on all of them."""
        if self.gradients is not None:
            self.gradients.compare()

    def training(self) -> AbstractContextManager[nn.Module]:
        """While inside, calls of the net are noted or go through DDP; outside, the net is as the user made it."""
        return self._itself if self._redirection is None else self._led(self._redirection, learns=True)

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """While inside, also inside `training`, calls of the net go past DDP, in the run's precision."""
        return self._itself if self._redirection is None else self._led(self._redirection, learns=False)

    @contextlib.contextmanager
    def _led(self, redirection: _Redirection, *, learns: bool) -> Iterator[nn.Module]:
        if not redirection.modes:
            self._before = self.net.__dict__.get("forward")
            self.net.__dict__["forward"] = redirection
        redirection.modes.append(learns)
        try:
            yield self.net
        finally:
            # Of two loops side by side the first may end first; which of two equal modes goes does not matter.
            position = len(redirection.modes) - 1 - redirection.modes[::-1].index(learns)
            del redirection.modes[position]
            if not redirection.modes:
                del self.net.__dict__["forward"]
                if self._before is not None:
                    self.net.__dict__["forward"] = self._before


@contextlib.contextmanager
def _without_trace(net: nn.Module, world: World) -> Iterator[None]:
    """While inside, a batch is trained on that only keeps the rank in step, and is another one in a resumed run.

    It takes no random numbers; nor, on rank 0, whose buffers are those of all in the end, does it change BatchNorm's
    statistics.
    """
    random = random_state(world.device)
    before = [(buffer, buffer.detach().clone()) for buffer in net.buffers()] if world.is_main else []
    yield
    load_random_state(random, world.device)
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """A view of complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
