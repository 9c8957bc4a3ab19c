"""The learning rate: what it is, what the history says of it, and when a scheduler changes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtrain.engine.hooks import adds_columns
from dtrain.engine.train_step import Interval, Task
from dtrain.errors import UsageError
from dtrain.rundir.columns import watched


class Rates:
    """Follows a task's optimizer and steps its scheduler.

    Args:
        task: its optimizer may come to be known only while it trains.

    Attributes:
        rate: of the last optimizer step that was taken, where the schedule goes on after each; None else.
    """

    def __init__(self, task: Task) -> None:
        self.rate: float | None = None
        self._task = task

    def begin(self) -> None:
        """Training begins. The order of steps is the engine's own, of which torch would else warn.

        It does so where the first step is left out (float16's scale is still too large), or was taken before the run
        was cut off.
        """
        if self._task.scheduler is not None and self._task.optimizer is not None:
            self._task.optimizer._opt_called = True  # type: ignore[attr-defined]

    def now(self) -> float | None:
        """Returns the learning rate of now, the first parameter group's; None where no optimizer is known."""
        return None if self._task.optimizer is None else float(self._task.optimizer.param_groups[0]["lr"])

    def of_row(self) -> float | None:
        """Returns what an epoch's row says: the rate of its last optimizer step."""
        return self.now() if self.rate is None else self.rate

    def step(self, interval: Interval, row: Mapping[str, Any] | None = None) -> None:
        """An optimizer step, or an epoch with its row, is over: steps the scheduler, where it counts these.

        Raises:
            UsageError: it watches a column, and there is none of this name.
        """
        scheduler = self._task.scheduler
        if scheduler is None or self._task.interval != interval:
            return
        if interval == "step":
            self.rate = self.now()
        if isinstance(scheduler, ReduceLROnPlateau):
            value = self._watched(row)
            if value is not None:  # else it was not measured in this epoch
                scheduler.step(float(value))
        else:
            scheduler.step()

    def _watched(self, row: Mapping[str, Any] | None) -> Any:
        """Returns the value of the column that ReduceLROnPlateau watches; None where a hook did not give it."""
        names = watched(self._task.monitor)
        found = next((row[name] for name in names if name in row), None) if row is not None else None
        if found is None and not (row is not None and adds_columns(self._task.hooks)):
            raise UsageError(
                f"ReduceLROnPlateau counts epochs and watches a column of the history, {names[0]}: return it from "
                "build_scheduler without 'step', and return such a value from the steps, or name another column with "
                "scheduler.monitor (scheduler_monitor in Python)."
            )
        return found
