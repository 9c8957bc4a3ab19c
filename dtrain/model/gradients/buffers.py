"""Buffers of nets that several ranks train: before each train step all ranks get rank 0's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.model.gradients.drift import agreed

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.model.ddp import Replica

logger = logging.getLogger(__name__)

_CLOSE = 1e-3  # what kernels compute differently on ranks of different kinds is less


def check_buffers(replicas: Iterable[Replica], world: World, *, first: bool) -> None:
    """Looks for buffers that are trained, and after the first train step for those that ranks fill differently.

    Raises:
        StepError: one is trained; every rank raises it.
    """
    for replica in replicas:
        for name, buffer in replica.net.named_buffers():
            if buffer.requires_grad and buffer.is_leaf:
                raise agreed(
                    f"the buffer {name} is trained (requires_grad), but on several ranks buffers are copied from "
                    "rank 0, and their gradients are not averaged. Make it a parameter: nn.Parameter(...)."
                )
    if first:
        _warn_of_own([one for replica in replicas for one in _filled(replica)], world)


def _filled(replica: Replica) -> Iterator[tuple[str, Tensor]]:
    """The buffers of real numbers, but for BatchNorm's, for which there is `sync_batchnorm`."""
    for module_name, module in replica.net.named_modules():
        if isinstance(module, _BatchNorm):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.layout is torch.strided and buffer.numel():
                yield f"{module_name}.{name}" if module_name else name, buffer.detach()


def _warn_of_own(named: list[tuple[str, Tensor]], world: World) -> None:
    if not named:
        return
    sizes = [part for _, buffer in named for part in (buffer.sum(dtype=world.sum_dtype), _norm(buffer, world))]
    mine = torch.nan_to_num(torch.stack([size.to(world.device) for size in sizes]))
    both = torch.stack([mine, -mine])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    apart = both.sum(dim=0) > _CLOSE * both.abs().amax(dim=0)
    names = [name for (name, _), differs in zip(named, apart.view(-1, 2).any(dim=1).tolist(), strict=True) if differs]
    if names and world.is_main:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        logger.warning(
            "the buffer %s%s is filled by each rank from its own part of the batch, and rank 0's is kept: it is not "
            "what one process has. Sum what it is made of over the ranks in forward, by torch.distributed.all_reduce.",
            *(names[0], more),
        )


def _norm(buffer: Tensor, world: World) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(buffer, dtype=world.sum_dtype)
    return size
