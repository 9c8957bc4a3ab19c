"""Optimizers whose weights for training and for use differ, and that switch between them: `train()` and `eval()`.

As the schedule-free ones (Defazio et al. 2024): the net trains at y, a mean of the iterates and their average x, and
x is what is validated and saved. To switch there and back rounds, so that the weights are put back as they were, to
the last bit: what is validated or saved, and how often, changes no training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.distributed.dtensor import cut_like, local_part
from dtrain.model.optimizers import optimizers_holding


def switching(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Returns those of the optimizers that have `train()` and `eval()`; of one that wraps another, the other counts."""
    found = []
    for one in optimizers:
        inner = getattr(one, "optimizer", None)  # as Accelerate's, which has the methods in any case
        within = inner if isinstance(inner, Optimizer) else one
        if _switches(type(within)):
            found.append(within)
    return list({id(one): one for one in found}.values())


def switching_of(module: nn.Module, known: Optimizer | None) -> list[Optimizer]:
    """Returns those of a net's optimizers, also of those that its train step alone knows."""
    first = [] if known is None else [known]
    # Accelerate's own classes have both methods whatever they wrap, and what they wrap is of another class.
    if not any(_switches(kind) for kind in _kinds(Optimizer) if kind.__module__.partition(".")[0] != "accelerate"):
        return switching(first)  # to look through all objects takes 0.1 s, in each process
    holding = optimizers_holding({id(parameter) for parameter in module.parameters()})
    return switching([*first, *holding])


def _switches(kind: type) -> bool:
    return all(callable(getattr(kind, name, None)) for name in ("train", "eval"))


def _kinds(kind: type) -> Iterator[type]:
    subclasses: list[type] = kind.__subclasses__()
    for one in subclasses:
        yield one
        yield from _kinds(one)


class OptimizerModes:
    """The weights that optimizers switch a net to for use; it has what `WeightAverage` has for its users.

    Args:
        module: the net, on the rank's device.
        optimizers: that switch.

    Attributes:
        taken: nothing; the optimizers have all of their state.
    """

    taken: int | None = None

    def __init__(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        self._named = {name: p for name, p in module.named_parameters() if id(p) in held}

    def train(self) -> None:
        """Has the net train."""
        self._all("train")

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the net has the weights for use; then those that it trains with, as they were."""
        own = [local_part(parameter).clone() for parameter in self._named.values()]
        self._all("eval")
        try:
            yield
        finally:
            self._all("train")
            with torch.no_grad():
                for parameter, value in zip(self._named.values(), own, strict=True):
                    local_part(parameter).copy_(value)

    def settle(self) -> None:
        """Leaves the weights for use in the net."""
        self._all("eval")

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights for use by name, copies."""
        with self.in_place():
            return {name: parameter.detach().clone() for name, parameter in self._named.items()}

    def exact(self) -> dict[str, Tensor]:
        """Returns nothing: the weights for use are computed from what the optimizers keep."""
        return {}

    def trained(self) -> dict[str, Tensor]:
        """Returns the weights that the net trains with, by name, where they are."""
        return {name: parameter.detach() for name, parameter in self._named.items()}

    @torch.no_grad()
    def take_up(
        self,
        trained: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        updates: int,
        taken: int | None = None,
    ) -> None:
        """Goes on from a net that was loaded with the weights for use, by those that it trains with."""
        for name, value in trained.items():
            parameter = self._named[name]
            local_part(parameter).copy_(local_part(cut_like(value, parameter)))

    def _all(self, method: str) -> None:
        for one in self._optimizers:
            switch: Callable[[], Any] = getattr(one, method)
            switch()
