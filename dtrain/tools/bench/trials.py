"""Tries what could make a run faster: by turns, the run as it is and with one change, each time from the same state.

::

    for candidate in candidates, while there is time:
        run as it is, candidate;  candidate, run as it is;  ...    until it is no faster, or five times

Each turn is an engine of its own on the same net, whose first steps are left out. What is noted of a trial is rank 0's.
Where a rank fails alone within a step, the others wait for it in a collective: then all ranks end, after word of what
was tried and why it failed, and whoever has started them starts them again for what is left (`dtrain.cli.bench`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

from dtrain.config import Settings
from dtrain.distributed.world import World
from dtrain.engine.train_step import Task
from dtrain.errors import AgreedError, DtrainError
from dtrain.launch.signals.stop_request import is_ctrl_c
from dtrain.tools.bench.advice import TrialResult
from dtrain.tools.bench.candidates import Candidate
from dtrain.tools.bench.clock import WARM_UP, time_steps, waiter
from dtrain.tools.bench.engines import bench_engine, match_layout
from dtrain.tools.bench.state import KeptState

_TURNS = 5  # of each side, at most
_SECONDS = 0.15  # of the steps of a turn
_FEWEST = 5  # steps of a turn
_MOST = 4  # times the steps that the bench was to time
_WARM_UP_CUDA = 12  # a step that is captured has some for itself
_NO_GAIN = 1.03  # gain of two turns or more, below which no more are taken
_LONGEST = 110  # characters of a reason


class Trials:
    """Tries candidates on a task, which is as before afterwards.

    Args:
        task: the user's objects.
        settings: the config.
        world: the ranks.
        kept: the task's state.
        step_seconds: of a step, about; the same on all ranks.
        steps: that the bench was to time.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - called at one place with all of them
        self, task: Task, settings: Settings, world: World, kept: KeptState, step_seconds: float, steps: int
    ) -> None:
        self._task, self._settings, self._world, self._kept = task, settings, world, kept
        self._steps = max(_FEWEST, min(_MOST * steps, math.ceil(_SECONDS / step_seconds)))

    def try_out(self, candidate: Candidate, deadline: float) -> TrialResult:
        """Tries a candidate.

        Args:
            candidate: the same on all ranks.
            deadline: of `time.time()` on rank 0, after which no further turn is begun.

        Returns:
            what came of it, the same on all ranks.

        Raises:
            Exception: what a step has raised on this rank, where there are others; or the device can do no more.
        """
        what = (candidate.name, candidate.change, candidate.note)
        base: list[float] = []
        tried: list[float] = []
        skip = self._skip(candidate)
        try:
            if "compile" in candidate.train and self._goes_on(deadline):
                self._turn(candidate, skip)  # which compiles
            while len(tried) < _TURNS and self._goes_on(deadline) and not _is_hopeless(base, tried):
                first, second = (base, tried) if len(tried) % 2 == 0 else (tried, base)
                first.append(self._turn(None if first is base else candidate, skip))
                second.append(self._turn(None if second is base else candidate, skip))
                base, tried = self._world.gather_json([base, tried])[0]
        except (Exception, SystemExit) as error:
            if is_ctrl_c(error) or (self._world.size > 1 and not getattr(error, "on_all_ranks", False)):
                raise
            self._kept.put_back()
            waiter(self._world)()  # raises where the device is lost for this process
            return TrialResult(*what, why=reason(error))
        return TrialResult(*what, base, tried)

    def _skip(self, candidate: Candidate) -> int:
        """How many of a pass's first steps tell nothing: what workers have fetched before, say."""
        now = getattr(self._task.dl_train, "num_workers", 0)
        workers = max(now, candidate.loader.get("num_workers", 0))
        ahead = workers * (getattr(self._task.dl_train, "prefetch_factor", None) or 2)
        return max(WARM_UP if self._world.device.type == "cpu" else _WARM_UP_CUDA, ahead + 1 if workers else 0)

    def _goes_on(self, deadline: float) -> bool:
        """Whether there is time left, on rank 0."""
        return bool(self._world.gather_json(time.time() < deadline)[0])

    def _turn(self, candidate: Candidate | None, skip: int) -> float:
        """Trains for some steps; returns the seconds a sample."""
        self._kept.put_back()
        try:
            how = (self._task, self._settings, self._world, self._steps + skip, candidate)
            with bench_engine(*how) as engine:
                match_layout(engine.task.optimizer)
                clock = time_steps(engine, self._steps, skip)
            return clock.seconds / max(1, clock.samples)
        finally:
            self._kept.put_back()


def _is_hopeless(base: Sequence[float], tried: Sequence[float]) -> bool:
    return len(tried) > 1 and median(base) / median(tried) < _NO_GAIN


def reason(error: BaseException) -> str:
    """Returns a failure in one line."""
    if isinstance(error, AgreedError):
        text = error.failures[0].text
    else:
        text = str(error) if isinstance(error, DtrainError) else f"{type(error).__name__}: {error}"
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
