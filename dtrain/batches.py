"""Batches of any nesting: how many samples they hold, and how a part is cut out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dtrain.errors import DataError


def count_samples(batch: Any) -> int:
    """Returns the number of samples of a batch: the first dimension of its first tensor or array.

    Raises:
        DataError: there is nothing in the batch that could be counted.
    """
    found = _first_length(batch)
    if found is None:
        raise DataError(
            f"cannot count the samples of a batch of type {type(batch).__name__}: it holds no tensor or array. "
            "Use a DataLoader with a batch size over a map-style dataset, or put a tensor into the batch."
        )
    return found


def _first_length(batch: Any) -> int | None:
    shape = getattr(batch, "shape", None)
    if shape is not None and len(shape) > 0:
        return int(shape[0])
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return next((n for part in batch if (n := _first_length(part)) is not None), None)
    return None


def cut_batch(batch: Any, start: int, stop: int) -> Any:
    """Cuts samples start to stop out of a nested batch; what has no such length is kept whole."""
    return _cut(batch, start, stop, count_samples(batch))


def _cut(part: Any, start: int, stop: int, total: int) -> Any:
    shape = getattr(part, "shape", None)
    if isinstance(part, Tensor) or shape is not None:
        return part[start:stop] if shape is not None and len(shape) > 0 and shape[0] == total else part
    if isinstance(part, Mapping):
        return {key: _cut(value, start, stop, total) for key, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_cut(value, start, stop, total) for value in part))
    if isinstance(part, (tuple, list)):
        holds_samples = len(part) == total and _first_length(part) is None
        return part[start:stop] if holds_samples else type(part)(_cut(v, start, stop, total) for v in part)
    return part
