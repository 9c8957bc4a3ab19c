"""The average of the weights, taken in with each optimizer step, or computed by the optimizer itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.options import RunOptions
from dtrain.errors import UsageError
from dtrain.model.ema import WeightAverage
from dtrain.model.optimizer_modes import OptimizerModes, switching_of

logger = logging.getLogger(__name__)


class AverageWeights(EngineCallback):
    """Takes each optimizer step's weights into an average.

    Args:
        average: of the net's weights.
    """

    order = Order.AVERAGE

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def on_optimizer_step(self) -> None:
        """An optimizer has stepped."""
        self._average.update()


class TrainOptimizers(EngineCallback):
    """Has optimizers that switch between weights for training and for use train at each epoch's start.

    Args:
        modes: of the net's optimizers.
    """

    order = Order.AVERAGE

    def __init__(self, modes: OptimizerModes) -> None:
        self._modes = modes

    def on_epoch_start(self, epoch: int) -> None:
        """An epoch begins."""
        self._modes.train()


def follow(average: WeightAverage | OptimizerModes) -> EngineCallback:
    """Returns what has an average follow the training."""
    return TrainOptimizers(average) if isinstance(average, OptimizerModes) else AverageWeights(average)


def weight_average(
    module: nn.Module, optimizer: Optimizer | None, options: RunOptions, steps: Callable[[], int | None]
) -> WeightAverage | OptimizerModes | None:
    """Returns the average that the options ask for, or that an optimizer computes itself; None where there is none.

    Args:
        module: the net.
        optimizer: the task's own.
        options: the run's.
        steps: returns the optimizer steps of the whole run; None where that is not known.

    Raises:
        UsageError: equal weights are asked for from a share of the run on, and its length is not known; or an average
            of an optimizer's average is.
    """
    modes = switching_of(module, optimizer)
    key = "ema_decay" if options.ema_decay is not None else "swa_from"
    if modes and getattr(options, key) is not None:
        raise UsageError(
            f"{key} = {getattr(options, key)}: {type(modes[0]).__name__} averages the weights itself (it has train() "
            f"and eval()). Remove {key}.",
            on_all_ranks=True,
        )
    if modes:
        return OptimizerModes(module, modes)
    if options.swa_from is None:
        return None if options.ema_decay is None else WeightAverage(module, options.ema_decay)
    total = steps()
    if total is None:
        raise UsageError(
            f"swa_from = {options.swa_from}: a share of the run's steps, and the training loader has no length. Set "
            "train.max_steps too, or use ema_decay.",
            on_all_ranks=True,
        )
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        logger.warning(
            "swa_from: BatchNorm keeps the running statistics of the trained weights, not of the averaged ones. Where "
            "that matters, recompute them after training (torch.optim.swa_utils.update_bn)."
        )
    return WeightAverage(module, None, after=min(math.ceil(options.swa_from * total), total - 1))
