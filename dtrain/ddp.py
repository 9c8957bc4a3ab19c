"""DistributedDataParallel through which the user's own net can be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from dtrain.world import World


class TransparentDDP(DistributedDataParallel):
    """DDP that hands on what it does not have itself to the net it wraps, for reading and for writing.

    So `model.optimizer`, `model.loss_func` or a counter that a step keeps on its model work as on one rank.
    """

    def __getattr__(self, name: str) -> Any:
        """Looks an attribute up here, then on the wrapped net."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets DDP's own attributes here and all others on the wrapped net."""
        if name in self.__dict__ or hasattr(type(self), name) or name in self._modules:
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)


def wrap(module: nn.Module, world: World) -> nn.Module:
    """Places a net on the rank's device and, in a world of several, under DDP, as Accelerate does both.

    Returns:
        what the train step gets: the net itself on one rank, a `TransparentDDP` around it on more.
    """
    wrapped = world.accelerator.prepare_model(module)
    if type(wrapped) is DistributedDataParallel:
        wrapped.__class__ = TransparentDDP
    return wrapped  # type: ignore[no-any-return]
