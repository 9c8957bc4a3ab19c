"""A request to stop, heard at the places where all ranks can end together."""

from __future__ import annotations

from dtrain.distributed.stopping import Stopping
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.position import TrainPosition


class StopOnRequest(EngineCallback):
    """Ends training after a group of train steps or an epoch, or in validation, where some rank was asked to stop.

    Args:
        stopping: this rank's part in agreeing on where.
    """

    order = Order.STOP

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping

    def on_group_end(self, position: TrainPosition) -> None:
        """Comes by the next place.

        Raises:
            StopRequested: all ranks end here.
        """
        self._stopping.step()

    def on_validation_step(self) -> bool:
        """Returns whether some rank was asked to stop, as far as this one knows."""
        return self._stopping.asked
