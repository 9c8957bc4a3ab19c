"""The best weights of a `KerasModel.fit`, and its early end: made with the engine, and taken up with a run."""

from __future__ import annotations

from pathlib import Path

from dtrain.api.fit_forms import FitPlan
from dtrain.callbacks.early_stopping import BestKeeper
from dtrain.engine.loop import Engine
from dtrain.engine.monitored import check_early

_BEST = "the best weights of fit"


class Keeping:
    """Keeps the best epoch's weights, where a `fit` asks for it.

    Args:
        plan: what the call came to.
    """

    def __init__(self, plan: FitPlan) -> None:
        self._plan = plan
        self._keeper: BestKeeper | None = None

    def ready(self, engine: Engine) -> None:
        """Makes what keeps them; a run's checkpoints have them, too.

        Raises:
            UsageError: there is no such column.
        """
        plan = self._plan
        if plan.ckpt_path is None and plan.patience is None:
            return
        path = None if plan.ckpt_path is None else Path(plan.ckpt_path)
        check_early(engine, plan.monitor, "monitor", "the argument of fit")
        self._keeper = BestKeeper(engine, plan.monitor, plan.mode, plan.patience, path)
        engine.task.others = {**engine.task.others, _BEST: self._keeper}

    def begun(self, engine: Engine) -> None:
        """Has the engine call it, once it stands where it begins."""
        if self._keeper is not None:
            self._keeper.take_up()
            engine.callbacks.add(self._keeper)

    def restore(self) -> None:
        """Puts the best epoch's weights into the net."""
        if self._keeper is not None:
            self._keeper.restore()
