"""Rows of all ranks in a step, with gradient: for losses over the whole global batch (SimCLR, CLIP, triplets).

A rank's loss is the mean over its own rows, and its gradients get the weight of these (`RankBatch.scale`) on their way
into `param.grad`. What another rank's loss says of a row of this one comes back here with the other one's weight; it is
divided by this one's, which it gets again on its way. So the average over the ranks is the gradient of the mean over
all rows, however unequal the parts are.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dtrain.errors import StepError

if TYPE_CHECKING:
    from dtrain.data.partition import RankBatch


@dataclass
class PresentStep:
    """The batch that a step works on now, in this process.

    Attributes:
        rank_batch: this rank's part of it; None outside of steps.
        together: whether all ranks take the same number of steps, so that a step may have a collective.
        interrupted: whether a whole pass has run within the step, as for a validation: rows without a gradient are
            taken for that one's then, which came from all ranks.
    """

    rank_batch: RankBatch | None = None
    together: bool = True
    interrupted: bool = False


PRESENT = PresentStep()


@overload
def gather(values: Tensor, *, with_offset: Literal[False] = False) -> Tensor: ...


@overload
def gather(values: Tensor, *, with_offset: Literal[True]) -> tuple[Tensor, int]: ...


def gather(values: Tensor, *, with_offset: bool = False) -> Tensor | tuple[Tensor, int]:
    """Returns the rows of all ranks, in the data's order, with gradient; to be called in a step, on every rank alike.

    Rows of a batch that only keeps a rank in step with the others are left out on the others. On one rank, and in a
    process that is no rank, the values are returned as they are. A loop over a prepared loader is over once it has
    ended or was left; one by hand (`next(it)`) once the iterator has ended or is closed (`del it`).

    Args:
        values: of shape (rows, ...); ranks may have different numbers of rows, also none.
        with_offset: whether the index of this rank's first row is returned, too.

    Returns:
        of shape (rows of all ranks, ...), the same on all ranks; or that and the index.

    Raises:
        StepError: it is called in validation or prediction, where ranks may take different numbers of steps; or the
            ranks' values differ in type or in the shape of a row.
    """
    if values.ndim == 0:
        raise StepError("dtrain.gather() was given a tensor of shape (). It gathers rows: give it shape (rows, ...).")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return (values, 0) if with_offset else values
    rank_batch = PRESENT.rank_batch
    if rank_batch is not None and not PRESENT.together:
        raise StepError(
            "dtrain.gather() was called in a step of validation or prediction, where ranks may have different numbers "
            "of steps. For validation, set valid_together = True in the recipe (train_model(valid_together=True)), so "
            "that all ranks take part in every step. In a loop of your own, gather the rows after the loop; where "
            "you hold its iterator (it = iter(loader)), close it before (del it)."
        )
    learns = values.requires_grad and torch.is_grad_enabled()
    if PRESENT.interrupted and not learns:
        rank_batch = None
    if rank_batch is None and learns:
        raise StepError(
            "dtrain.gather() was called outside of a step with values that need a gradient: the weight of this rank's "
            "rows is not known there. Call it in the step, or in the loop over a prepared loader, or detach the values."
        )
    real = rank_batch is None or rank_batch.count > 0
    count = len(values) if rank_batch is None else rank_batch.count
    known = _exchange(values, rows=len(values) if real else 0, count=count)
    offset = sum(rows for rows, _ in known[: dist.get_rank()]) if real else sum(rows for rows, _ in known)
    gathered: Tensor = _Gather.apply(values, known, offset, real)  # type: ignore[no-untyped-call]
    return (gathered, offset) if with_offset else gathered


def _exchange(values: Tensor, *, rows: int, count: int) -> list[tuple[int, int]]:
    """Returns each rank's rows and samples.

    Raises:
        StepError: the values differ in more than their number of rows; all ranks raise it.
    """
    kind = f"{str(values.dtype).removeprefix('torch.')} rows of shape {tuple(values.shape[1:])}"
    mine = torch.tensor([rows, count, zlib.crc32(kind.encode())], dtype=torch.int64, device=values.device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    told = [part.tolist() for part in parts]
    if any(one[2] != told[0][2] for one in told):
        texts = _texts(kind, values.device)
        named = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
        raise StepError(
            f"dtrain.gather() was given different kinds of values on the ranks: {named}. Only the number of rows may "
            "differ.",
            on_all_ranks=True,
        )
    return [(one[0], one[1]) for one in told]


def _texts(text: str, device: torch.device) -> list[str]:
    """Returns each rank's text, of 200 bytes at most."""
    padded = text.encode()[:200].ljust(200)
    mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [bytes(part.tolist()).decode(errors="replace").rstrip() for part in parts]


class _Gather(Function):
    """The gathering itself, and its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, known: list[tuple[int, int]], offset: int, real: bool) -> Tensor:
        ctx.known, ctx.offset, ctx.real, ctx.rows = known, offset, real, len(values)
        most = max(rows for rows, _ in known)
        padded = values.new_zeros((most, *values.shape[1:]))
        if real:
            padded[: len(values)] = values.detach()
        parts = [torch.empty_like(padded) for _ in known]
        dist.all_gather(parts, padded)
        found = [part[:rows] for part, (rows, _) in zip(parts, known, strict=True)]
        return torch.cat([*found, *([] if real else [values.detach()])])  # so that the rank's own loss is as usual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows = sum(rows for rows, _ in ctx.known)
        count, total = ctx.known[dist.get_rank()][1], sum(count for _, count in ctx.known)
        kept = gradient.dtype
        wide = gradient[:rows].to(torch.promote_types(kept, torch.float32))
        summed = wide * (count / total) if count else torch.zeros_like(wide)
        summed = summed.contiguous()
        dist.all_reduce(summed)
        if not ctx.real:
            return gradient[rows:], None, None, None
        own = summed[ctx.offset : ctx.offset + ctx.rows]
        return (own * (total / count) if count else own).to(kept), None, None, None
