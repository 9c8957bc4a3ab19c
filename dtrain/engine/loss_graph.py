"""What autograd's nodes tell: their kinds, what they were computed from, the constants that they multiply with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EXACT = 1e-6
_MOST_BELOW = 12
PASSED_ON = frozenset(
    ("Add", "Sub", "Neg", "Rsub", "Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "ToCopy", "Clone")
)


@dataclass(frozen=True, slots=True)
class Divisor:
    """What a part of a loss is divided by: a number that the code says, or one that was computed."""

    value: float
    computed: bool

    @property
    def words(self) -> str:
        """What is done to the sum."""
        return f"times {1 / self.value:g}"

    def counts(self, rows: int) -> bool:
        """Whether it is the number of samples, or some times it, as where each has several values."""
        times = self.value / rows
        return round(times) >= 1 and abs(times - round(times)) <= _EXACT * times


def kind_of(node: Any) -> str:
    """`Mean` of a `MeanBackward0`."""
    return type(node).__name__.partition("Backward")[0]


def nodes_below(node: Any) -> list[Any]:
    """What a node's inputs were computed by, as far as these have a graph."""
    return [below for below, _ in node.next_functions if below is not None]


def saved_of(node: Any, name: str) -> Any:
    """What a node has saved; None where it has no such thing, or a backward pass has freed it."""
    try:
        return getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None


def shape_of(node: Any) -> tuple[int, ...]:
    """Of what a node was computed from, if known."""
    sizes = saved_of(node, "self_sym_sizes")
    if sizes is not None:
        return tuple(sizes)
    given = saved_of(node, "self")
    return tuple(given.shape) if isinstance(given, Tensor) else ()


def is_one(node: Any) -> bool:
    """Whether a node gives one number."""
    return all(math.prod(told.shape) == 1 for told in node._input_metadata)


def signed_of(number: int) -> int:
    """A dimension as it was given; torch's own type has no sign."""
    return number - ((number >= 1 << 63) << 64)


def constant_of(node: Any, kind: str) -> Divisor | None:
    """What a node multiplies with or divides by; None where that has a graph, too."""
    followed = [below is not None for below, _ in node.next_functions]
    if followed == [True]:  # a number of C++
        other = saved_of(node, "other")
        value, computed = (float(other), False) if isinstance(other, (int, float)) else (1.0, True)
    elif followed in ([True, False], [False, True]):
        other = saved_of(node, "other" if followed[0] else "self")
        if kind == "Div" and not followed[0]:
            return None
        one = isinstance(other, Tensor) and other.numel() == 1 and not other.is_complex()
        value, computed = (float(other), not _is_number(other)) if one else (1.0, True)
    else:
        return None
    return Divisor(value if kind == "Div" else 1 / value if value else 0.0, computed)


def _is_number(other: Tensor) -> bool:
    """Whether it was a number of Python's: torch lets these take the type of what they are combined with."""
    small = torch.int8 if not other.is_floating_point() else torch.float16
    return other.ndim == 0 and torch.result_type(other, torch.zeros((), dtype=small)) == small


def picks(node: Any) -> bool:
    """Whether what is averaged was picked by a mask or by indices."""
    nodes, left = nodes_below(node), _MOST_BELOW
    while nodes and left:
        node, left = nodes.pop(), left - 1
        if kind_of(node) in {"Index", "MaskedSelect", "IndexSelect"}:
            return True
        nodes += nodes_below(node)
    return False


def values_of(node: Any) -> int:
    """How many values a mean goes over, with those of a mean below it."""
    target = saved_of(node, "target") if kind_of(node).startswith("NllLoss") else None
    count = target.numel() if isinstance(target, Tensor) else math.prod(shape_of(node))
    below = nodes_below(node)
    while kind_of(node) == "Mean" and below and kind_of(below[0]) in PASSED_ON | {"Mean"}:
        if kind_of(below[0]) == "Mean":
            count = max(count, math.prod(shape_of(below[0])))
        below = nodes_below(below[0])
    return count
