"""The average of the weights, taken in with each optimizer step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch import nn

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.options import RunOptions
from dtrain.errors import UsageError
from dtrain.model.ema import WeightAverage

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


def weight_average(module: nn.Module, options: RunOptions, steps: Callable[[], int | None]) -> WeightAverage | None:
    """Returns the average that the options ask for; None where they ask for none.

    Args:
        module: the net.
        options: the run's.
        steps: returns the optimizer steps of the whole run; None where that is not known.

    Raises:
        UsageError: equal weights are asked for from a share of the run on, and its length is not known.
    """
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
