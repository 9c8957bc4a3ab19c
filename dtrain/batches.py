"""Batches of any nesting: counted, cut and joined along their first dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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


def join_batches(batches: list[Any]) -> Any:
    """Joins nested batches of one structure to one; what is no tensor is taken from the first, lists are chained."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(batches) if first.ndim else first
    if isinstance(first, Mapping):
        return {key: join_batches([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        if _first_length(first) is None and isinstance(first, list):
            return [item for batch in batches for item in batch]
        return type(first)(join_batches(list(parts)) for parts in zip(*batches, strict=True))
    return first


def first_rows(batch: Any) -> list[Tensor]:
    """Returns the samples of a batch's first tensor, one by one."""
    if isinstance(batch, Tensor):
        return list(batch) if batch.ndim else []
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return next((rows for part in batch if (rows := first_rows(part))), [])
    return []


def tensor_bytes(tensor: Tensor) -> bytes:
    """Returns a tensor's values as they lie in memory, to take a fingerprint of."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
