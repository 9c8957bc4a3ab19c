"""BatchNorm over all ranks: its statistics are those of the whole global batch, wherever it takes a batch's.

That is in training, and in validation where it has no running ones (`dtrain.model.untracked_batchnorm`).

torch's SyncBatchNorm has no CPU version, replaces the net's modules, and counts the rows of a rank that only takes part
with weight 0. Here `torch.nn.functional.batch_norm` itself is led elsewhere while a step runs, so that the net
stays as it is: its modules, their names, subclasses of BatchNorm.

    mean = sum over ranks of x / count,   variance = sum over ranks of x^2 / count - mean^2     (in float64)

Source: Ioffe and Szegedy 2015, with the sums taken over ranks; the gradient flows back through the same sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dtrain.distributed.some_ranks import sum_among_

if TYPE_CHECKING:
    from dtrain.distributed.world import World


class SyncedBatchNorm(TorchFunctionMode):
    """While active, BatchNorm that takes a batch's statistics takes them over all ranks; else it is torch's own.

    Every rank must come by the same BatchNorm layers in the same order.

    Args:
        world: the ranks.

    Attributes:
        counts: whether this rank's rows are real, or there only to keep the ranks together.
        among: the ranks that have rows of this batch, where the others take no step; None for all.
        scale: what this rank's gradients are multiplied by on their way into `param.grad`, after they left here.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.counts = True
        self.among: list[int] | None = None
        self.scale = 1.0

    def of_part(self, count: int, scale: float = 1.0) -> SyncedBatchNorm:
        """Returns itself, to be entered for a step on this rank's part of a batch.

        Args:
            count: its real samples.
            scale: as the attribute.
        """
        self.counts, self.scale = count > 0, scale
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leads one function elsewhere and leaves all others as they are."""
        if func is torch.nn.functional.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(  # noqa: PLR0913, PLR0917 - the signature of torch's
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return torch.nn.functional.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        exact = input.to(self._world.sum_dtype)
        others = [dimension for dimension in range(input.dim()) if dimension != 1]
        rows = input.numel() // input.shape[1] * self.counts
        sums = torch.stack([exact.sum(others), exact.square().sum(others)]) * self.counts
        packed = torch.cat([sums.flatten(), sums.new_tensor([rows])])
        summed = _Summed.apply(packed, self)  # type: ignore[no-untyped-call]
        count = summed[-1].detach()
        if count <= 1:
            raise ValueError(
                f"BatchNorm needs more than 1 value per channel for its statistics; all ranks together have {count}"
            )
        mean, mean_of_squares = (summed[:-1] / count).view(2, -1)
        variance = (mean_of_squares - mean.square()).clamp_min(0.0)
        with torch.no_grad():
            _follow(running_mean, mean, momentum)
            _follow(running_var, variance * count / (count - 1), momentum)
        shape = [1, -1, *[1] * (input.dim() - 2)]
        factor = torch.rsqrt(variance + eps)
        if weight is not None:
            factor = factor * weight
        shift = -mean * factor
        if bias is not None:
            shift = shift + bias
        normal: Tensor = (exact * factor.view(shape) + shift.view(shape)).to(input.dtype)
        return normal

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks that take part, in place."""
        return self._world.sum_(tensor) if self.among is None else sum_among_(tensor, self.among)


def _follow(running: Tensor | None, latest: Tensor, momentum: float) -> None:
    if running is not None:
        running.lerp_(latest.to(running.dtype), momentum)


class _Summed(torch.autograd.Function):
    """A sum over ranks through which gradients flow: each rank's part gets the sum of all ranks' gradients.

    The gradient that comes from rank s is to have the weight of rank s; what leaves here is weighted by this rank's
    later on, which is undone in advance.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, mode: SyncedBatchNorm) -> Tensor:
        """Sums over the ranks."""
        ctx.mode = mode
        return mode.sum_(mine.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Sums the gradients over the ranks."""
        mode = ctx.mode
        summed = mode.sum_(gradients[0] * mode.scale)
        return (summed / mode.scale if mode.scale else torch.zeros_like(summed)), None
