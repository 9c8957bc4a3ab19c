"""Tensors of which each rank holds a part (torch's DTensor): the part, the whole, and a whole cut into parts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; told without importing them, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Returns what this rank holds of a tensor, in the same memory; all of it where it is not sharded."""
    part: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()
    return part


def whole_tensor(tensor: Any) -> Tensor:
    """Returns the whole of a tensor; of a sharded one a new tensor, for which every rank must ask."""
    whole: Tensor = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()
    return whole


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gathers tensors, one after the other; every rank must give those of the same names in the same order.

    Args:
        tensors: by name; sharded ones and others.
        keep: whether this rank wants them.

    Returns:
        copies on the CPU, contiguous; empty on a rank that does not want them.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if keep:
            kept[name] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
    return kept


def cut_like(whole: Tensor, pattern: Tensor) -> Tensor:
    """Returns a whole tensor, which every rank has, as a pattern is: cut alike, or as it is.

    Args:
        whole: of any device.
        pattern: of the same shape where it is sharded.
    """
    if not is_sharded(pattern):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = pattern.device_mesh  # type: ignore[attr-defined]
    placements = pattern.placements  # type: ignore[attr-defined]
    cut: Tensor = distribute_tensor(whole.to(mesh.device_type), mesh, placements, src_data_rank=None)
    return cut


def cut_state(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Returns what an optimizer keeps of one parameter, cut as the parameter is where it has its shape.

    Args:
        state: name -> whole tensors, and other values, such as a count of steps.
        parameter: the net's.
    """
    if not is_sharded(parameter):
        return state
    return {name: cut_like(v, parameter) if _fits(v, parameter) else v for name, v in state.items()}


def _fits(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and not is_sharded(value)
