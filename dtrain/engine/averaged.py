"""The average of the weights, taken in with each optimizer step."""

from __future__ import annotations

from dtrain.engine.callback import EngineCallback, Order
from dtrain.model.ema import WeightAverage


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
