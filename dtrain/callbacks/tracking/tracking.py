"""What the engine tells, on its way to the trackers: rate-limited, kept on the disk, and each epoch once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dtrain.callbacks.progress import PassFacts
from dtrain.callbacks.tracking.base import RunEnd, Tracker
from dtrain.callbacks.tracking.files import END, IDS, StepLog, write_json
from dtrain.callbacks.tracking.gpu import GpuGauge
from dtrain.engine.callback import EngineCallback, Order
from dtrain.layout import MEDIA, TRACKING
from dtrain.rundir.columns import validated
from dtrain.rundir.media import Entry

if TYPE_CHECKING:
    from dtrain.engine.metrics import MeanTable

logger = logging.getLogger(__name__)


def _always() -> bool:
    return True


class Tracking(EngineCallback):
    """Passes a run's values on to its trackers; on rank 0.

    A row goes on once it is not computed anew by a run that is killed and resumed: when the checkpoint that is due
    at its epoch's end is on the disk, which is about at once. So each tracker gets each epoch once, as it is in
    history.csv.

    Args:
        run: the run's folder.
        log: where values are kept.
        every: seconds between the values of two moments; 0 for none but the epochs', and a user's own once an epoch.
        device: of this rank.
        artifacts: which checkpoint's weights the trackers get at the end; False for none.

    Attributes:
        trackers: who is told.
        settled: returns whether no checkpoint is being written.
    """

    order = Order.TRACKERS

    def __init__(
        self,
        run: Path,
        log: StepLog,
        *,
        every: float,
        device: torch.device,
        artifacts: Literal[False, "best", "last"] = False,
    ) -> None:
        self.trackers: list[Tracker] = []
        self.artifacts = artifacts
        self.settled: Callable[[], bool] = _always
        self._run, self._log, self._gpu = run, log, GpuGauge(device)
        self._every = every
        self._due = float("inf")
        self._facts = PassFacts("", 0)
        self._before = (0.0, 0)
        self._held: list[Mapping[str, Any]] = []
        self._own: dict[str, tuple[float, int, float]] = {}  # name -> the last value, its optimizer step and time
        self._own_due = float("-inf") if every else float("inf")
        self._ids: dict[str, str] = {}
        self._noting = threading.Lock()
        self._broken = False
        self._unwritten: set[str] = set()

    # --- what the engine tells ----------------------------------------------------------------------------

    def on_pass_start(self, facts: PassFacts) -> None:
        """A pass begins; within a train pass there is something to tell at times."""
        self._release()
        if facts.within:
            self._due = float("inf")
            return
        now = time.monotonic()
        self._facts = facts
        self._due = now + self._every if self._every and facts.split == "train" else float("inf")
        self._before = now - facts.aside(), facts.samples()

    def on_progress(self, table: MeanTable) -> None:
        """A step is done: a look at the clock, and at most every so many seconds more."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._every
            self._tick(table, now)

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """An epoch is done, and its row is in the history's file."""
        self._release()
        self._pass_on()
        self._keep({"row": row["epoch"], "updates": self._facts.updates(), "at": time.time()})
        self._held.append(row)

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """A validation within an epoch is done: values of this moment, which are told at once."""
        if self._every:
            self._due = time.monotonic() + self._every
        self._pass_on()
        self._log_values({f"step/{name}": row[name] for name in validated(row)}, row["step"])

    def finish(self, end: RunEnd) -> None:
        """Ends the trackers' runs."""
        self._release(everything=True)
        self._pass_on()
        artifact = None if end.weights is None else str(end.weights.resolve())
        self._write(END, {"failed": end.failed, "complete": end.complete, "artifact": artifact})
        for tracker in self.trackers:
            try:
                tracker.finish(end)
            except Exception:
                logger.warning("%s could not finish its run", tracker.name, exc_info=True)
        self.note_ids()
        self._guarded(self._log.close)

    def ids(self) -> dict[str, str]:
        """Returns tracker's name -> the id of its run, as far as these are known."""
        return {tracker.name: found for tracker in self.trackers if (found := tracker.run_id())}

    def note_ids(self) -> None:
        """Keeps the ids in the run's folder, which a run that is killed leaves behind; for any thread."""
        with self._noting:
            ids = self.ids()
            if ids != self._ids and self._write(IDS, ids):
                self._ids = ids

    def moment(self, values: Mapping[str, float]) -> None:
        """Takes further values of now, where values within an epoch are wanted at all."""
        if self._every:
            self.log_values(values, self._facts.updates())

    def log_values(self, values: Mapping[str, float], updates: int) -> None:
        """Takes numbers of a user's own, of a moment.

        These may come with each step: of each name the last one within `every` goes on, and none is left behind at an
        epoch's end or the run's.
        """
        now, at = time.monotonic(), time.time()
        self._own.update({name: (value, updates, at) for name, value in values.items()})
        if now >= self._own_due:
            self._pass_on()

    def log_media(self, entry: Entry) -> None:
        """Takes an image or the like, which lies in the run's folder."""
        for tracker in self.trackers:
            log = getattr(tracker, "log_media", None)
            if log is not None:
                log(entry, self._run / MEDIA)

    # --- on to the trackers -------------------------------------------------------------------------------

    def _tick(self, table: MeanTable, now: float) -> None:
        facts = self._facts
        self._release()
        before, samples = self._before, facts.samples()
        now -= facts.aside()
        self._before = now, samples
        values = {f"step/{name}": value for name, value in table.running().items()}
        rate = facts.lr()
        if rate is not None:
            values["step/lr"] = rate
        values["step/samples_per_second"] = (samples - before[1]) * facts.run.ranks / max(now - before[0], 1e-9)
        self._pass_on()
        self._log_values(values | self._gpu.read(), facts.updates())
        self.note_ids()

    def _pass_on(self) -> None:
        """Has what waits of a user's own go on, each value with its own step."""
        own, self._own = self._own, {}
        if self._every:
            self._own_due = time.monotonic() + self._every
        for updates in sorted({step for _, step, _ in own.values()}):
            values = {name: value for name, (value, step, _) in own.items() if step == updates}
            self._log_values(values, updates, max(at for _, step, at in own.values() if step == updates))

    def _log_values(self, values: Mapping[str, float], updates: int, at: float | None = None) -> None:
        self._keep({"updates": updates, "at": time.time() if at is None else at, "values": dict(values)})
        for tracker in self.trackers:
            tracker.log_steps(values, updates)

    def _release(self, *, everything: bool = False) -> None:
        if not self._held or not (everything or self.settled()):
            return
        rows, self._held = self._held, []
        self._keep({"firm": rows[-1]["epoch"]})
        for row in rows:
            for tracker in self.trackers:
                tracker.log_epoch(row)

    def _write(self, name: str, content: Mapping[str, Any]) -> bool:
        """Returns whether a file could be written; one that cannot be ends no run for its sake, and is told of once."""
        try:
            write_json(self._run / TRACKING / name, content)
        except OSError as error:
            if name not in self._unwritten:
                self._unwritten.add(name)
                logger.warning("%s cannot be saved: %s", self._run / TRACKING / name, error)
            return False
        return True

    def _keep(self, content: Mapping[str, Any]) -> None:
        self._guarded(lambda: self._log.add(content))

    def _guarded(self, act: Callable[[], None]) -> None:
        """Does something with the log; a disk that takes no line ends no run for its sake, and is told of once."""
        try:
            act()
        except OSError as error:
            if not self._broken:
                self._broken = True
                logger.warning("values for the trackers cannot be saved: %s", error)
