"""Metrics of the whole set as plain functions: called once a pass, with the values of all samples in the data's order.

A step returns their arguments for its batch, one row of a tensor or one entry of a list for each sample::

    def build_metrics():
        return {"f1": lambda predictions, labels: f1_score(labels, predictions, average="macro")}

    def valid_step(model, x, y):
        logits = model(x)
        return {"loss": cross_entropy(logits, y), "f1": (logits.argmax(1), y)}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dtrain.data.partition import RANK_STRIDE
from dtrain.engine.packed import gather_entries, own_values, pack_entries, unpack_entries
from dtrain.errors import DataError, StepError, add_remark

if TYPE_CHECKING:
    from dtrain.distributed.world import World

_CPU = torch.device("cpu")


class WholeSet:
    """A function, and what this rank's steps have returned for it.

    Args:
        name: of the metric.
        function: the user's.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self._whose = f"metric {name!r}"
        self._entries: list[tuple[int, int, Any]] = []  # where its first sample is, how many, and the arguments

    def reset(self) -> None:
        """Forgets what was added."""
        self._entries = []

    def add(self, start: int, count: int, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Adds a batch.

        Args:
            start: where its first sample is in the data's order.
            count: its samples.
            arguments, keywords: of the function; each has a row or an entry for each sample.

        They are copied: a loader may use the memory of its batch again.

        Raises:
            StepError: one has another length, or is of a kind that cannot be sent to other ranks or saved.
        """
        for key, value in (*enumerate(arguments), *keywords.items()):
            length = len(value) if hasattr(value, "__len__") and getattr(value, "shape", None) != () else None
            if length != count or isinstance(value, (str, Mapping)):
                what = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else f"type {type(value).__name__}"
                what += f" and length {length}" if length is not None and not hasattr(value, "shape") else ""
                which = f"argument {key + 1}" if isinstance(key, int) else f"argument {key!r}"
                raise StepError(
                    f"metric {self._name!r}: the step returned {which} with {what} for a batch of {count} samples. It "
                    "is computed from all samples: return a row of a tensor, or an entry of a list, for each."
                )
        mine = own_values([list(arguments), dict(keywords)], self._whose)
        self._entries.append((start, count, mine))

    def compute(self, world: World) -> dict[str, float]:
        """Calls the function with all ranks' values, on rank 0.

        Returns:
            columns, equal on all ranks: the metric's name, or, where the function returns a mapping, NAME_KEY.

        Raises:
            StepError: it returns no number.
            DataError: the ranks do not have all samples, or some twice.
        """
        entries = self._entries if world.size == 1 else gather_entries(self._entries, world, self._whose)
        found = self._called(sorted(entries, key=lambda entry: entry[0])) if world.is_main else {}
        return dict(world.gather_json(found)[0])

    def state(self) -> dict[str, Any]:
        """Returns what was added so far, for a checkpoint within an epoch."""
        return pack_entries(self._entries, self._whose)

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._entries = unpack_entries(state)

    def _called(self, entries: Sequence[tuple[int, int, Any]]) -> dict[str, float]:
        position = samples = 0
        for start, count, _ in entries:
            if start > position and start % RANK_STRIDE == 0:
                position = start  # the first one of the next rank that reads a part of its own
            if start != position:
                raise DataError(
                    f"metric {self._name!r}: the ranks read different data: some samples came twice, or not at all."
                )
            position += count
            samples += count
        if not entries:
            raise DataError(f"metric {self._name!r}: no step returned a value for it.")
        arguments = [_joined(parts) for parts in zip(*(values[0] for _, _, values in entries), strict=True)]
        names = list(entries[0][2][1])
        keywords = {name: _joined([values[1][name] for _, _, values in entries]) for name in names}
        try:
            with torch.no_grad():
                returned = self._function(*arguments, **keywords)
        except Exception as error:
            add_remark(error, f"in metric {self._name!r} ({_place(self._function)}), called with all {samples} samples")
            raise
        if isinstance(returned, Mapping):
            return {f"{self._name}_{key}": self._number(value) for key, value in returned.items()}
        return {self._name: self._number(returned)}

    def _number(self, value: Any) -> float:
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise StepError(
                f"metric {self._name!r} ({_place(self._function)}) returned {type(value).__name__}. It should return a "
                "number, or a mapping of names to numbers, each of which becomes a column."
            ) from None


def _place(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (
        getattr(function, "__name__", "?") if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}"
    )


def _joined(parts: Sequence[Any]) -> Any:
    """Returns one argument for all samples: a tensor or an array where all rows have one shape, else a list."""
    if all(isinstance(part, Tensor) for part in parts):
        alike = len({(part.shape[1:], part.dtype) for part in parts}) == 1
        rows = [part.detach().to(_CPU) for part in parts]
        return torch.cat(rows) if alike else [row for part in rows for row in part]
    if all(isinstance(part, np.ndarray) for part in parts) and len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    return [row for part in parts for row in part]
