"""A rank's rows within a tensor for the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.engine.row_rule import Part


def whole_like(tensor: Tensor, dimension: int, part: Part) -> Tensor:
    """Returns an empty tensor for the whole batch, laid out in memory as a process with the whole batch has it."""
    shape = list(tensor.shape)
    shape[dimension] = shape[dimension] // part.rows * part.total
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        fits = layout is torch.contiguous_format or tensor.ndim == (4 if layout is torch.channels_last else 5)
        if fits and tensor.is_contiguous(memory_format=layout):
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
    along = tensor.stride(dimension)
    strides = [
        stride // part.rows * part.total if stride > along and stride % part.rows == 0 else stride
        for stride in tensor.stride()
    ]
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)


def own(whole: Tensor, dimension: int, part: Part) -> Tensor:
    """Returns this rank's rows, as a view."""
    times = whole.shape[dimension] // part.total
    return whole.narrow(dimension, part.first * times, part.rows * times)


def one_row(tensor: Tensor, dimension: int) -> Tensor | None:
    """Returns the row that all rows are, None where they differ; on a GPU it would have to be waited for."""
    row = tensor.narrow(dimension, 0, 1)
    return row if tensor.is_cpu and torch.equal(tensor, row.expand_as(tensor)) else None
