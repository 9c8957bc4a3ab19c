"""Batches of one structure, copied to memory that stays where it is, from which a captured step reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dtrain.errors import StepError

_CONSTANTS = (str, bytes, int, float, bool, type(None))


def structure_of(batch: Any, device: torch.device, tensors: list[Tensor]) -> Any:
    """Returns what is the same for two batches that one graph can take: nesting, types, shapes, and all other values.

    Args:
        batch: nested lists, tuples and dicts of tensors and constants, on the device.
        device: the rank's.
        tensors: gets its tensors, each once, in their order.

    Raises:
        StepError: it has something else.
    """
    if isinstance(batch, Tensor):
        return _tensor(batch, device, tensors)
    if isinstance(batch, _CONSTANTS):
        return type(batch), batch
    if type(batch) is dict:
        return (dict, *((key, structure_of(part, device, tensors)) for key, part in batch.items()))
    if type(batch) in (list, tuple) or (isinstance(batch, tuple) and hasattr(batch, "_fields")):
        return (type(batch), *(structure_of(part, device, tensors) for part in batch))
    raise StepError(
        f"train.cuda_graph: a batch has a {type(batch).__name__}, of which dtrain does not know the tensors. Let the "
        "loader's collate_fn return tensors, numbers and strings in lists, tuples and dicts, or set "
        "train.cuda_graph=false."
    )


def _tensor(tensor: Tensor, device: torch.device, tensors: list[Tensor]) -> Any:
    for number, known in enumerate(tensors):
        if known is tensor:
            return "the same as", number
    plain = tensor.layout is torch.strided and not tensor.is_nested and not is_traceable_wrapper_subclass(tensor)
    if not plain or tensor.device != device or tensor.requires_grad:
        raise StepError(
            f"train.cuda_graph: a batch has a tensor that is sparse, nested or not on {device}, or that takes "
            "gradients. Use dense tensors, or set train.cuda_graph=false."
        )
    tensors.append(tensor)
    return tensor.dtype, tensor.shape, tensor.stride()


def static_copy(batch: Any, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Returns a batch of the same structure in memory of its own, and its tensors.

    Args:
        batch: of which `structure_of` has returned the structure.
        tensors: that it has collected.
    """
    own = {id(tensor): tensor.clone() for tensor in tensors}
    return _replaced(batch, own), list(own.values())


def _replaced(batch: Any, own: Mapping[int, Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return own[id(batch)]
    if type(batch) is dict:
        return {key: _replaced(part, own) for key, part in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_replaced(part, own) for part in batch)
    return type(batch)(*(_replaced(part, own) for part in batch)) if isinstance(batch, tuple) else batch
