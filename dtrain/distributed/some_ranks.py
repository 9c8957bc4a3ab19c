"""A sum over some of the ranks, where the others have nothing to do with it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_among_(tensor: Tensor, ranks: list[int]) -> Tensor:
    """Sums a tensor, in place, over some of the ranks, this one among them; returns it.

    By messages from rank to rank: a process group would have to be made by all ranks.

    Args:
        tensor: of the same shape and type on these ranks.
        ranks: in ascending order.
    """
    first, others = ranks[0], ranks[1:]
    summed = tensor.contiguous()
    if dist.get_rank() == first:
        for other in others:
            dist.recv(part := torch.empty_like(summed), src=other)
            summed += part
        for other in others:
            dist.send(summed, dst=other)
    else:
        dist.send(summed, dst=first)
        dist.recv(summed, src=first)
    return tensor if summed is tensor else tensor.copy_(summed)
