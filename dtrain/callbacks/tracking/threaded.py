"""A tracker in a thread of its own, so that what it waits for, it does not wait for in the training's way.

The thread has the run's history, and asks the tracker how far it is: a row that the tracker has not got, since the
run was killed before it was written or a server was away, is sent before any later one, and none is sent twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dtrain.callbacks.tracking.base import RunEnd
from dtrain.masking import redacted
from dtrain.rundir.media import Entry

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0  # to load a library and to make a store's tables, which is better not left half done
_FINISH_SECONDS = 10.0
_AGAIN_SECONDS = 60.0  # after which a server that was away is asked again
_LAST_PAUSE_SECONDS = 1.0  # before it is asked for the last time
_MEDIA = "an image or the like"  # in place of a value's name
_MOST = 10_000  # that wait, beyond which moments are left out; what hangs for hours fills no memory


class Backend(Protocol):
    """What runs in the thread; any method may wait, or raise."""

    name: str

    def load(self) -> bool:
        """Loads the library; returns whether it talks to a server, which may be away for a while."""

    def start(self) -> str:
        """Starts a run, or resumes it; returns its id. It is called again after a server was away."""

    def last_epoch(self) -> int:
        """Returns the last epoch whose row the tracker has, 0 for none."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Takes values."""

    def finish(self, end: RunEnd) -> None:
        """Ends the run."""


class Threaded:
    """Hands a tracker's calls to a thread, in their order.

    The first call that fails is told of, and is the last; but where there is a server, it is asked again.

    Args:
        backend: the tracker.
        run_id: of its run, where that is resumed.
        rows: the history that the run is resumed from.
        noted: called in the thread once the id is known.
        remedy: the command that sends later what could not be sent; empty where there is none.
    """

    def __init__(
        self,
        backend: Backend,
        run_id: str = "",
        rows: Sequence[Mapping[str, Any]] = (),
        *,
        noted: Callable[[], None] = lambda: None,
        remedy: str = "",
    ) -> None:
        self.name = backend.name
        self._backend, self._id = backend, run_id
        self._noted, self._remedy = noted, remedy
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Mapping[str, Any], int | None]] = deque((row, None) for row in rows)
        self._end: RunEnd | None = None
        self._sent = 0
        self._has_server = False
        self._failed = False
        self._is_full = False
        self._tried_at_end = False
        self._away = ""  # why the server does not take anything
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)

    def begin(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def run_id(self) -> str:
        """Returns the id of the tracker's run, "" before it is known."""
        return self._id

    def log_steps(self, values: Mapping[str, float], step: int) -> None:
        """Hands on the values of a moment."""
        self._hand_on(values, step)

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Hands on a row, which the tracker gets unless it has it already."""
        self._hand_on(row, None)

    def log_media(self, entry: Entry, folder: Path) -> None:
        """Hands on an image or the like, where the tracker takes such.

        Args:
            entry: what it is.
            folder: in which its file lies.
        """
        if hasattr(self._backend, "log_media"):
            self._hand_on({_MEDIA: (entry, folder)}, entry.step)

    def finish(self, end: RunEnd) -> None:
        """Waits until the thread is done, for a bounded time."""
        with self._changed:
            self._end = end
            self._changed.notify()
        self._ready.wait(_START_SECONDS)
        self._thread.join(_FINISH_SECONDS)
        if self._failed or not (self._thread.is_alive() or self._away):
            return
        self._failed = True
        why = self._away or f"no answer within {_FINISH_SECONDS:g} s"
        later = f". All values are kept; send them later with: {self._remedy}" if self._keeps else ""
        logger.warning("%s: not everything was sent: %s%s", self.name, why, later)

    @property
    def _keeps(self) -> bool:
        return self._has_server and bool(self._remedy)

    def _hand_on(self, values: Mapping[str, Any], step: int | None) -> None:
        with self._changed:
            if self._failed:
                return
            if step is None or len(self._waiting) < _MOST:  # rows are few, and the tracker is to have each
                self._waiting.append((values, step))
                self._changed.notify()
                return
            told, self._is_full = self._is_full, True
        if not told:
            logger.warning(
                "%s: it is slower than values come: %s of them wait, and further ones within epochs are not sent until "
                "there is room. Training continues, and every epoch's row is sent.",
                self.name, f"{_MOST:,}",
            )  # fmt: skip

    # --- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._has_server = self._backend.load()
            if self._has_server:
                self._ready.set()
            while not self._delivered():
                pass
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no matter of the training's
            self._give_up(_words(error))

    def _delivered(self) -> bool:
        """Sends what comes until the end; returns whether that has come, or else a server was away and is back."""
        try:
            self._id = self._backend.start()
            self._noted()
            self._sent = self._backend.last_epoch()
            self._ready.set()
            while (end := self._send()) is None:
                self._away = ""
            self._backend.finish(end)
            self._away = ""
        except Exception as error:
            if not self._has_server:
                raise
            return self._is_over_after(_words(error))
        return True

    def _send(self) -> RunEnd | None:
        """Sends the next values, and waits for them; returns the run's end where nothing is left."""
        with self._changed:
            while not self._waiting:
                if self._end is not None:
                    return self._end
                self._changed.wait()
            values, step = self._waiting[0]
        if _MEDIA in values:
            self._backend.log_media(*values[_MEDIA])  # type: ignore[attr-defined]
        elif step is not None:
            self._backend.log(values, step)
        elif values["epoch"] > self._sent:
            self._backend.log(values, values["epoch"])
            self._sent = values["epoch"]
        with self._changed:
            self._waiting.popleft()
        return None

    def _is_over_after(self, why: str) -> bool:
        """Waits after a failure until the server is to be asked again; returns whether it is the end already."""
        if not self._away:
            logger.warning(
                "%s: offline: %s. Training continues, and all values are kept; it is tried again every %g s",
                self.name, why, _AGAIN_SECONDS,
            )  # fmt: skip
        self._away = why
        with self._changed:
            if self._end is None:
                self._changed.wait_for(lambda: self._end is not None, _AGAIN_SECONDS)
                return False
        if self._tried_at_end:
            return True
        self._tried_at_end = True  # the attempt that failed may have begun before the end
        time.sleep(_LAST_PAUSE_SECONDS)
        return False

    def _give_up(self, why: str) -> None:
        self._failed = True
        self._ready.set()
        logger.warning("%s: tracking stopped: %s. Training continues; history.csv has everything.", self.name, why)


def _words(error: Exception) -> str:
    return redacted(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
