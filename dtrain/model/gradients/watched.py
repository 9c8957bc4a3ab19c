"""The parameters whose gradients several ranks average: which there are, which are trained, and of which net."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from dtrain.model.hooks import can_learn, hook_accumulated

if TYPE_CHECKING:
    from dtrain.model.ddp import Replica


class NumberedParameters:
    """The parameters of the nets of this process, each of them numbered.

    Args:
        arrived: called with a parameter's number after each gradient that it gets.

    Attributes:
        replicas: the nets.
        names: of the parameters.
        parameters: that can learn; frozen ones too.
        known: id -> number.
        trained: of each, whether it was trained when that was last noted.
    """

    def __init__(self, arrived: Callable[[int], None]) -> None:
        self._arrived = arrived
        self._hooks: list[Any] = []
        self.replicas: list[Replica] = []
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.known: dict[int, int] = {}
        self.trained: list[bool] = []

    def take_up(self) -> None:
        """Takes the parameters that the nets have now."""
        self.close()
        several = len(self.replicas) > 1
        named: dict[int, tuple[str, nn.Parameter]] = {}
        for number, replica in enumerate(self.replicas, start=1):
            for name, parameter in replica.net.named_parameters():
                if can_learn(parameter):
                    named.setdefault(id(parameter), (f"{name} (of net {number})" if several else name, parameter))
        self.names = [name for name, _ in named.values()]
        self.parameters = [parameter for _, parameter in named.values()]
        self.known = {known: number for number, known in enumerate(named)}
        self.trained = self.trained_now()
        self._hooks = [
            hook_accumulated(parameter, lambda _, number=number: self._arrived(number))  # type: ignore[misc]
            for number, parameter in enumerate(self.parameters)
        ]

    def trained_now(self) -> list[bool]:
        """Returns of each parameter whether it is trained."""
        return [parameter.requires_grad for parameter in self.parameters]

    @property
    def are_all(self) -> bool:
        """Whether no parameter has joined or left the nets; looks through all their modules."""
        found = {id(p) for replica in self.replicas for p in replica.net.parameters() if can_learn(p)}
        return found == set(self.known)

    def active(self) -> list[Replica]:
        """Returns the nets that the open passes train; the only one in any case."""
        return self.replicas if len(self.replicas) == 1 else [one for one in self.replicas if one.trains]

    def learning(self) -> list[Replica]:
        """Returns those of them that have something to learn."""
        return [one for one in self.active() if any(p.requires_grad for p in one.net.parameters())]

    def expected(self) -> list[int]:
        """Returns the numbers of the parameters that the open passes train."""
        if len(self.replicas) == 1:
            return [number for number, parameter in enumerate(self.parameters) if parameter.requires_grad]
        own = {id(p) for one in self.active() for p in one.net.parameters() if p.requires_grad}
        return [number for number, parameter in enumerate(self.parameters) if id(parameter) in own]

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        for hook in self._hooks:
            hook.remove()
