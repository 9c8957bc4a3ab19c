"""BatchNorm over all ranks: in training its statistics are those of the whole global batch.

torch's SyncBatchNorm has no CPU version, replaces the net's modules, and counts the rows of a rank that only takes part
with weight 0. Here `torch.nn.functional.batch_norm` itself is led elsewhere while a train step runs, so that the net
stays as it is: its modules, their names, subclasses of BatchNorm.

    mean = sum over ranks of x / count,   variance = sum over ranks of x^2 / count - mean^2     (in float64)

Source: Ioffe and Szegedy 2015, with the sums taken over ranks; the gradient flows back through the same sums.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from dtrain.distributed.world import World


logger = logging.getLogger(__name__)


class SyncedBatchNorm(TorchFunctionMode):
    """While active, BatchNorm in training mode takes its statistics over all ranks; in eval mode it is torch's own.

    Every rank must come by the same BatchNorm layers in the same order.

    Args:
        world: the ranks.

    Attributes:
        counts: whether this rank's rows are real, or there only to keep the ranks together.
        scale: what this rank's gradients are multiplied by on their way into `param.grad`, after they left here.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.counts = True
        self.scale = 1.0

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
            raise ValueError(f"BatchNorm needs more than 1 value per channel to train; all ranks together have {count}")
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
        """Sums over the ranks, in place."""
        return self._world.sum_(tensor)


def warn_of_untracked(module: nn.Module, world: World) -> None:
    """Warns, on rank 0 of several, of BatchNorm without running statistics: it has those of a batch in validation, too.

    Args:
        module: the net.
        world: the ranks; each validates a part of each batch.
    """
    if world.size == 1 or not world.is_main:
        return
    kind = nn.modules.batchnorm._BatchNorm
    names = [name for name, part in module.named_modules() if isinstance(part, kind) and part.running_mean is None]
    if names:
        logger.warning(
            "%s%s: BatchNorm with track_running_stats=False takes its statistics from each rank's part of a batch in "
            "validation, too, so val_ values depend on the number of ranks. Track them, or validate on one rank: "
            "dtrain evaluate RUN.",
            ", ".join(names[:3]),
            ", ..." * (len(names) > 3),
        )


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
