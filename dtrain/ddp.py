"""DistributedDataParallel behind the user's own net: the step gets the net itself, on any number of ranks.

DDP must see each forward pass, since that is where it makes ready to average the gradients. A wrapper in place
of the net would hide it: attributes, methods, `isinstance`, the names in `state_dict()`. So DDP wraps a small inner
module instead, and while a train step runs, a call of the net is led through DDP::

    net(x) -> net.forward, redirected -> DDP -> _Inner -> the net's own forward
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from dtrain.world import World


class _Inner(nn.Module):
    """What DDP wraps: the net's parameters and its own forward, without the net's hooks, which run outside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.own_forward = net.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the net's own forward."""
        return self.own_forward(*args, **kwargs)


class _Redirection:
    """Stands in for `net.forward` while a train step runs."""

    def __init__(self, net: nn.Module, ddp: nn.Module) -> None:
        self._net = net
        self.ddp: Any = ddp
        self._own = net.forward
        self._inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # a net that calls itself
            return self._own(*args, **kwargs)
        self._inside = True
        try:
            return self.ddp(*args, **kwargs)
        finally:
            self._inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the net that is made within a step (a weight average, say) runs its own forward."""
        copied = memo.get(id(self._net), self._net)
        return MethodType(type(self._net).forward, copied)


class Replica:
    """One rank's copy of the net, with gradients that are averaged over the ranks.

    Args:
        net: the user's net; it is moved to the rank's device in place.
        world: the ranks.
    """

    def __init__(self, net: nn.Module, world: World) -> None:
        self.net = net
        self._before = net.__dict__.get("forward")
        self._redirection: _Redirection | None = None
        # Moves the net and, with mixed precision, puts its forward under autocast, for training and validation alike.
        world.accelerator.prepare_model(net, evaluation_mode=True)
        if world.size > 1 and any(parameter.requires_grad for parameter in net.parameters()):
            self._redirection = _Redirection(net, world.accelerator.prepare_model(_Inner(net)))
        world.accelerator._models.clear()  # nobody else's to keep alive

    def close(self) -> None:
        """Gives the net back its own forward."""
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.net.__dict__.pop(name, None)
        if self._before is not None:
            self.net.__dict__["forward"] = self._before

    @contextlib.contextmanager
    def averaging(self, wanted: bool) -> Iterator[None]:
        """While inside, backward averages the gradients over the ranks, or, if not wanted, adds them up here."""
        if wanted or self._redirection is None:
            yield
            return
        with self._redirection.ddp.no_sync():
            yield

    @contextlib.contextmanager
    def training(self) -> Iterator[nn.Module]:
        """While inside, calls of the net go through DDP; outside, the net is as the user made it."""
        if self._redirection is None:
            yield self.net
            return
        before = self.net.__dict__.get("forward")
        self.net.__dict__["forward"] = self._redirection
        try:
            yield self.net
        finally:
            del self.net.__dict__["forward"]
            if before is not None:
                self.net.__dict__["forward"] = before
