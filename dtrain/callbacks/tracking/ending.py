"""The end of a run, for its trackers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.errors import StopRequested


class EndTrackers(EngineCallback):
    """Ends the trackers' runs, as failed ones where the run has failed.

    Args:
        tracking: the trackers.
        engine: trains.
        weights: returns the file with the best or the last saved epoch's weights; None where there is none.
    """

    order = Order.TRACKERS

    def __init__(
        self, tracking: Tracking, engine: Engine, weights: Callable[[Literal["best", "last"]], Path | None]
    ) -> None:
        self._tracking, self._engine, self._weights = tracking, engine, weights
        self._complete = False
        self._failed = True

    def on_train_end(self) -> None:
        """Training has come to its end."""
        self._complete, self._failed = True, False

    def on_exception(self, error: BaseException) -> None:
        """Something has ended training."""
        self._complete, self._failed = False, not isinstance(error, StopRequested)

    def close(self) -> None:
        """Ends the trackers' runs: by now the last checkpoint is on the disk."""
        artifacts = self._tracking.artifacts
        weights = self._weights(artifacts) if self._complete and artifacts else None
        self._tracking.finish(RunEnd(self._failed, self._complete, tuple(self._engine.history.rows), weights))
