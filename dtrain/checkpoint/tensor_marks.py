"""Marks of data that lies in memory, whole: a change of any one sample shows, which a choice of samples may miss.

A tensor is taken in blocks of samples. Of each sample there is one number, its product with a fixed random vector; of
each block, the norm of these and a sum with weights by the samples' places, so that an exchange of samples shows, too.
Whole numbers, such as labels, are hashed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

Mark = list[Any]

_MOST_BYTES = 32 << 20  # of one tensor; of a larger one, samples at equal distances
_BLOCKS = 64
_DIGITS = 6
_TURN = 2.399963  # radians: weights of neighbours, and of far ones, differ


def tensor_marks(loader: Any) -> dict[str, Mark]:
    """Returns the marks of a loader's data by name; none where it is no TensorDataset (or parts of such), nor a list.

    Args:
        loader: the user's: a DataLoader, or a list of batches.
    """
    found = {}
    for name, part in _parts(loader.dataset if isinstance(loader, DataLoader) else loader, ""):
        mark = tensor_mark(part) if isinstance(part, Tensor) else [_digest(repr(part).encode())]
        if mark:
            found[name] = mark
    return found


def _parts(data: Any, name: str) -> Iterator[tuple[str, Tensor | list[int]]]:
    if type(data) is TensorDataset:
        yield from ((f"{name}tensor {number}", tensor) for number, tensor in enumerate(data.tensors))
    elif type(data) is Subset:
        yield f"{name}indices", [int(index) for index in data.indices]
        yield from _parts(data.dataset, name)
    elif type(data) is ConcatDataset:
        for number, one in enumerate(data.datasets):
            yield from _parts(one, f"{name}dataset {number}, ")
    elif type(data) in (list, tuple) and data:
        yield from ((f"{name}part {number} of the batches", joined) for number, joined in enumerate(_columns(data)))


def _columns(batches: Sequence[Any]) -> list[Tensor]:
    """Returns the tensors of batches, those of one place in all of them as one; none where they do not fit together."""
    rows = [batch if type(batch) in (list, tuple) else [batch] for batch in batches]
    columns = list(zip(*rows, strict=False))
    if any(not isinstance(part, Tensor) or part.ndim == 0 for column in columns for part in column):
        return []
    if sum(part.nbytes for column in columns for part in column) > _MOST_BYTES:
        return []
    if any(len({(part.shape[1:], part.dtype, part.device) for part in column}) > 1 for column in columns):
        return []
    return [torch.cat(column) for column in columns]


def tensor_mark(tensor: Tensor) -> Mark:
    """Returns the mark of a tensor, whose first dimension counts samples; an empty one where it can have none."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.ndim == 0:
        return []
    mark: Mark = [_digest(repr((tuple(tensor.shape), str(tensor.dtype))).encode())]
    rows = tensor.detach()[:: max(1, -(-tensor.nbytes // _MOST_BYTES))]
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    blocks = rows.flatten(1).tensor_split(_BLOCKS) if rows.ndim > 1 else rows[:, None].tensor_split(_BLOCKS)
    if not (rows.is_floating_point() or rows.dtype == torch.uint8):
        digest = hashlib.blake2b(digest_size=8)
        for block in blocks:
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return [*mark, digest.hexdigest()]
    first = 0
    for block in blocks:
        if len(block):
            mark.append(_block_mark(block.cpu().float(), first))
            first += len(block)
    return mark


def _block_mark(block: Tensor, first: int) -> list[float]:
    """Returns norm and weighted sum of a block of samples, of shape (samples, values)."""
    products = (torch.nan_to_num(block) @ _direction(block.shape[1])).double()
    weights = torch.cos(torch.arange(first, first + len(block), dtype=torch.float64) * _TURN)
    return [float(f"{number:.{_DIGITS}g}") for number in (float(products.norm()), float(products @ weights))]


@functools.lru_cache(maxsize=4)
def _direction(length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(0))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
