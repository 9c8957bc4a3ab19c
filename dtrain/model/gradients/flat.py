"""The average over the ranks of some parameters' gradients, in flat buffers: one collective for many gradients.

::

    flat = [grad_1 / size, grad_2 / size, ...]    # of one type, up to so many bytes
    all-reduce (sum) flat; copy it back

A rank that has no gradient where others have one adds zeros and gets the average. Where all ranks have the same
gradient already it stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dtrain.distributed.world import World

_BYTES = 1 << 25  # of a flat buffer


def dense_and_sparse(touched: Sequence[int], parameters: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Returns the numbers of the parameters whose gradients are to be averaged: dense ones and sparse ones.

    Args:
        touched: of each parameter, whether it got a gradient.
        parameters: all of them.
    """
    numbers = [number for number, mark in enumerate(touched) if mark]
    sparse = {n for n in numbers if (g := parameters[n].grad) is not None and g.layout is torch.sparse_coo}
    return [number for number in numbers if number not in sparse], sorted(sparse)


def average_dense(parameters: Iterable[Tensor], world: World) -> None:
    """Averages `parameter.grad` over the ranks, in place.

    Args:
        parameters: the same ones in the same order on all ranks; one without a gradient here gets one.
        world: the ranks.
    """
    with torch.no_grad():
        for pack in _packs(_gradient(parameter) for parameter in parameters):
            flat = torch.cat([gradient.reshape(-1) for gradient in pack]).mul_(1 / world.size)
            world.sum_(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in pack])
            torch._foreach_copy_(pack, [part.view(g.shape) for part, g in zip(parts, pack, strict=True)])


def average_sparse(parameters: Iterable[Tensor], world: World) -> None:
    """Averages sparse gradients over the ranks: each rank gets all ranks' rows.

    Args:
        parameters: as for `average_dense`; no rank has a dense gradient of one of them.
        world: the ranks.
    """
    with torch.no_grad():
        for parameter in parameters:
            mine = None if parameter.grad is None else parameter.grad.coalesce()
            indices = world.gather_tensors(None if mine is None else mine.indices())
            values = world.gather_tensors(None if mine is None else mine.values())
            rows = [part for part in indices if part is not None]
            numbers = [part for part in values if part is not None]
            joined = torch.cat(rows, dim=1), torch.cat(numbers)
            summed = torch.sparse_coo_tensor(*joined, parameter.shape, check_invariants=False)
            parameter.grad = summed.coalesce() * (1 / world.size)


def _gradient(parameter: Tensor) -> Tensor:
    """A dense view of a parameter's gradient, of real numbers; made of zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout is not torch.strided:
        parameter.grad = parameter.grad.to_dense()
    gradient = parameter.grad
    # With a graph of its own (create_graph) it is changed behind the graph's back, as DDP does.
    gradient = gradient.data if gradient.requires_grad else gradient.detach()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _packs(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    open_packs: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for gradient in gradients:
        kind = (gradient.dtype, gradient.device)
        open_packs.setdefault(kind, []).append(gradient)
        sizes[kind] = sizes.get(kind, 0) + gradient.numel() * gradient.element_size()
        if sizes[kind] >= _BYTES:
            sizes[kind] = 0
            yield open_packs.pop(kind)
    yield from open_packs.values()
