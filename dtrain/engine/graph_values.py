"""What a captured step returns, and the sums over a pass that it adds to by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtrain.engine.metrics import Mean, MeanTable, Observed, Value


class GraphSums:
    """The sums of a pass's values, where graphs add to them.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def make(self, table: MeanTable) -> None:
        """Makes those that a table has, before a capture."""
        for name, known in table.sums.items():
            for part in ("total", "count"):
                if isinstance(getattr(known, part), (float, Tensor)):  # a plain value's count is an int
                    zero = torch.zeros((), dtype=torch.float64, device=self._device)
                    self._tensors.setdefault((name, part), zero)
        self.adopt(table)

    def adopt(self, table: MeanTable) -> None:
        """Has a table's sums be these, before a replay; each pass has a table of its own."""
        for (name, part), own in self._tensors.items():
            known = table.sums[name]
            value = getattr(known, part)
            if value is not own:
                own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)
                setattr(known, part, own)

    def add(self, values: dict[str, Value], count: int) -> None:
        """Adds a step's values, as a part of the graph; as `MeanTable.add` does on a device."""
        for name, value in values.items():
            total = self._tensors[name, "total"]
            if isinstance(value, Mean):
                total.add_(value.total.detach())  # type: ignore[union-attr]
                self._tensors[name, "count"].add_(value.count.detach())  # type: ignore[union-attr]
            else:
                total.add_(value.detach(), alpha=count)  # type: ignore[union-attr]


def without_graph(value: Any) -> Any:
    """Returns a step's value as it is kept."""
    return _each(value, Tensor.detach)


def own_copy(value: Any) -> Any:
    """Returns a copy of what the next replay writes over."""
    return _each(value, Tensor.clone)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mean):
        return Mean(_each(value.total, change), _each(value.count, change))
    if isinstance(value, Observed):
        keywords = {name: _each(part, change) for name, part in value.keywords.items()}
        return Observed(tuple(_each(part, change) for part in value.arguments), keywords)
    return value
