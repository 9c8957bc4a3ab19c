"""The rates of a range test: every optimizer of the net steps with the test's, in the ratios they were made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dtrain.errors import UsageError


class TestedRates:
    """Sets the rates of each optimizer of a net before it steps, whoever calls its `step()`.

    Args:
        net: an optimizer of none of its parameters is left alone.
        first: the one whose rate the test's is; None for the first one that steps.
        rate: returns the test's rate now.

    Attributes:
        first: that one, None before it is known.
        stepped: whether one has stepped.
    """

    __test__ = False  # no class of tests

    def __init__(self, net: nn.Module, first: Optimizer | None, rate: Callable[[], float]) -> None:
        self.first = first
        self.stepped = False
        self._net, self._rate = net, rate
        self._ratios: dict[int, tuple[Optimizer, list[float]]] = {}  # held, so that no other one gets its id
        self._handle: RemovableHandle | None = None
        if first is not None:
            self._ratios[id(first)] = first, ratios_of(first, own_rate(first))

    def open(self) -> None:
        """From here on the rates are set."""
        self._handle = register_optimizer_step_pre_hook(self._set)

    def close(self) -> None:
        """The optimizers are let go; closing twice does no harm."""
        if self._handle is not None:
            self._handle.remove()

    def ratios(self) -> tuple[float, ...]:
        """Returns those of the first optimizer's groups, where they differ."""
        found = () if self.first is None else self._ratios[id(self.first)][1]
        return tuple(found) if len(set(found)) > 1 else ()

    def others(self) -> dict[str, tuple[float, ...]]:
        """Returns, by name, the ratios of other optimizers' groups that have stepped, to the first one's rate."""
        others = [known for known in self._ratios.values() if known[0] is not self.first]
        return {name_of(optimizer, self._net): tuple(dict.fromkeys(ratios)) for optimizer, ratios in others}

    def _set(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._ratios:
            own = {id(parameter) for parameter in self._net.parameters()}
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                return
            self.first = self.first or optimizer
            self._ratios[id(optimizer)] = optimizer, ratios_of(optimizer, own_rate(self.first))
        self.stepped = True
        rate = self._rate()
        for group, ratio in zip(optimizer.param_groups, self._ratios[id(optimizer)][1], strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio


def own_rate(optimizer: Optimizer) -> float:
    """Returns the rate that an optimizer was made with: that of groups without one of their own."""
    first = optimizer.param_groups[0]
    rate = optimizer.defaults.get("lr")
    return float(first.get("initial_lr", first["lr"]) if rate is None else rate)


def ratios_of(optimizer: Optimizer, rate: float) -> list[float]:
    """Returns the rate of each group over one, without what a schedule has made of it.

    Raises:
        UsageError: that one is 0, and the groups differ.
    """
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if rate == 0:
        if any(rates):
            raise UsageError(
                "find lr keeps the ratios of the parameter groups' lr "
                f"({', '.join(map(str, rates))}) to the optimizer's "
                "lr, which is 0. Set another lr."
            )
        return [1.0] * len(rates)
    return [own / rate for own in rates]


def name_of(optimizer: Optimizer | None, net: nn.Module) -> str:
    """Returns where an optimizer is on a net, as `opt_d` or `optimizers.d`; its type where it is not there."""
    for name, value in vars(net).items():
        if value is optimizer:
            return name
        held: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            held = value.items()
        elif isinstance(value, (list, tuple)):
            held = enumerate(value)
        for key, one in held:
            if one is optimizer:
                return f"{name}.{key}"
    return type(optimizer).__name__
