"""A profile of a few optimizer steps by `torch.profiler`, in the run's folder: `profile/rank-K.json.gz`.

The trace is Chrome's: https://ui.perfetto.dev or chrome://tracing show it. Nothing is measured before the first of
these steps and after the last one, and no number that training computes is touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.position import TrainPosition
from dtrain.files import make_folder
from dtrain.layout import PROFILE

logger = logging.getLogger(__name__)

WAIT, WARM_UP = 3, 2  # optimizer steps that are not measured; and those whose measures, slow at first, are dropped
_SHOWN = 10  # operators


@dataclass(frozen=True)
class Operator:
    """What a profile says of an operator.

    Attributes:
        name: torch's.
        calls: how often it ran.
        seconds: in it, without those that it called: of the device where it computes on one, else of the CPU.
    """

    name: str
    calls: int
    seconds: float


class Profile(EngineCallback):
    """Records a rank's optimizer steps, from the fourth or so that this process takes.

    Args:
        engine: it has not trained yet.
        steps: optimizer steps to record.
        folder: the run's.

    Attributes:
        path: of the trace.
        steps: optimizer steps that were recorded; 0 as long as there is no trace.
    """

    order = Order.RECORDS

    def __init__(self, engine: Engine, steps: int, folder: Path) -> None:
        self.path = folder / PROFILE / f"rank-{engine.world.rank}.json.gz"
        self.steps = 0
        self._seen = 0
        self._dropped = False
        self._operators: list[Operator] = []
        self._on_device = engine.world.device.type == "cuda"
        self._profile: profile | None = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_device],
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._last = WAIT + WARM_UP + steps
        self._part = self.path.with_name(f".part-{self.path.name}")
        make_folder(folder, PROFILE)
        self._part.unlink(missing_ok=True)  # which a kill has left
        with _without_kinetos_words():
            self._profile.start()

    def on_train_end(self) -> None:
        """Ends the recording, where the run was over before; ending it twice does no harm."""
        if self._profile is not None:
            ended, self._profile = self._profile, None
            with _without_kinetos_words():
                ended.stop()

    def close(self) -> None:
        """Ends a recording that was cut off, and leaves no trace: the run that goes on records its own."""
        self._dropped = True
        self.on_train_end()

    def words(self) -> str:
        """Returns what was found, as a table for a person, once training has ended."""
        if not self.steps:
            return f"profile: the run ended within its first {WAIT + WARM_UP} optimizer steps, which are not recorded"
        head = f"profile of {self.steps} optimizer step{'s' * (self.steps > 1)}: {self.path}"
        return "\n".join([head, *table(self._operators, "device" if self._on_device else "CPU")])

    def on_step_end(self, position: TrainPosition) -> None:
        """Records one optimizer step more, where it is one of those."""
        if position.split != "train" or self._profile is None:
            return
        self._seen += 1
        with _without_kinetos_words():
            self._profile.step()
        if self._seen == self._last:
            self.on_train_end()

    def _write(self, found: profile) -> None:
        if self._dropped:
            return
        try:
            found.export_chrome_trace(str(self._part))
            self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)
        self.steps = max(0, self._seen - WAIT - WARM_UP)
        self._operators = sorted(map(self._operator, found.key_averages()), key=lambda one: -one.seconds)
        self._operators = [one for one in self._operators if not one.name.startswith("ProfilerStep")]

    def _operator(self, event: Any) -> Operator:
        micros = event.self_device_time_total if self._on_device else event.self_cpu_time_total
        return Operator(event.key, event.count, micros / 1e6)


def start_profile(engine: Engine, steps: int, folder: Path) -> Profile | None:
    """Has this rank's next optimizer steps recorded; None where a trace of the run is there already."""
    path = folder / PROFILE / f"rank-{engine.world.rank}.json.gz"
    if path.exists():
        logger.warning("train.profile: %s already exists and is not overwritten. Remove it for a new one.", path)
        return None
    return Profile(engine, steps, folder)


def table(operators: Sequence[Operator], device: str) -> list[str]:
    """Returns the lines of a table of the operators that took longest.

    Args:
        operators: all of them, the one that took longest first.
        device: whose time theirs is.
    """
    total = sum(one.seconds for one in operators) or 1.0
    shown = [(one, f"{one.name[:47]}..." if len(one.name) > 50 else one.name) for one in operators[:_SHOWN]]
    width = max((len(name) for _, name in shown), default=0)
    lines = [f"  {'operator':<{width}}  {'calls':>7}  {device + ' ms':>10}  share"]
    for one, name in shown:
        lines.append(
            f"  {name:<{width}}  {one.calls:>7}  {1e3 * one.seconds:>10.2f}  {100 * one.seconds / total:>3.0f} %"
        )
    return lines


@contextlib.contextmanager
def _without_kinetos_words() -> Iterator[None]:
    """Keeps libkineto from noting on standard error that it begins and ends, where nobody has asked it to."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
