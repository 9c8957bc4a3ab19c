"""A tracker in a thread of its own, so that what it waits for, it does not wait for in the training's way."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dtrain.tracking.base import End

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0  # to load a library and to make a store's tables, which is better not left half done
_FINISH_SECONDS = 10.0
_MOST = 10_000  # calls that wait; a server that hangs for hours fills no memory


class Backend(Protocol):
    """What runs in the thread; any method may wait, or raise."""

    name: str

    def start(self) -> str:
        """Starts a run, or goes on with it; returns its id."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Takes values."""

    def finish(self, end: End) -> None:
        """Ends the run."""


class Threaded:
    """Hands a tracker's calls to a thread, in their order. The first one that fails is told of, and is the last.

    Args:
        backend: the tracker.
        run_id: of its run, where that is gone on with.
        told: the last epoch that it was told of before.
    """

    def __init__(self, backend: Backend, run_id: str = "", told: int = 0) -> None:
        self.name = backend.name
        self._backend = backend
        self._id = run_id
        self._told = told
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST)
        self._failed = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._calls.put(self._start)
        self._thread.start()

    def run_id(self) -> str:
        """Returns the id of the tracker's run, "" before it is known."""
        return self._id

    def log_steps(self, values: Mapping[str, float], step: int) -> None:
        """Hands on the values of a moment."""
        self._call(lambda: self._backend.log(values, step))

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Hands on a row, but for one that the tracker was told of before a kill: what it has stays."""
        if row["epoch"] > self._told:
            self._call(lambda: self._backend.log(row, row["epoch"]))

    def finish(self, end: End) -> None:
        """Waits until the thread is done, for a bounded time."""
        self._call(lambda: self._backend.finish(end))
        self._call(None)
        self._started.wait(_START_SECONDS)
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            self._failed = True
            logger.warning("%s: not all is told: it did not answer within %g s", self.name, _FINISH_SECONDS)

    def _start(self) -> None:
        self._id = self._backend.start()
        self._started.set()

    def _call(self, call: Callable[[], None] | None) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up("it does not answer")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is no matter of the training's
                self._give_up(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
                return

    def _give_up(self, why: str) -> None:
        self._failed = True
        self._started.set()
        logger.warning("%s: not tracked from here on, since %s. Training goes on; history.csv has all.", self.name, why)
