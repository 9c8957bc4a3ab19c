"""What a supervisor does about signals: it asks ranks that know how to, once, to stop; or it ends them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dtrain.errors import EXIT_OK, EXIT_STOPPED
from dtrain.launch.heartbeat import read_beat
from dtrain.launch.requests import STOP_SIGNALS, request_heard
from dtrain.launch.screen import fresh_line

_HANG_UP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()


@contextlib.contextmanager
def signals_caught(*, stoppable: bool = False, before: Sequence[int] = ()) -> Iterator[list[int]]:
    """Notes signals instead of dying of them: SIGINT, SIGTERM and SIGHUP.

    Signals are the main thread's alone; in any other there is nothing to note. One that the process was started to
    ignore, as nohup does with SIGHUP, stays ignored.

    Args:
        stoppable: whether the ranks know how to stop on request; then SIGUSR1 is one.
        before: signals that came before this.
    """
    caught = list(before)
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    wanted = {*STOP_SIGNALS, *_HANG_UP} if stoppable else {signal.SIGINT, signal.SIGTERM, *_HANG_UP}
    found = {number: signal.getsignal(number) for number in wanted}
    found = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in found:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


class Orders:
    """Follows the signals that a supervisor caught.

    Args:
        caught: gets the signals that come.
        seconds: how long the ranks may take to stop on request; None where they do not know how to.
        reports: where the ranks' heartbeats are.

    Attributes:
        ends: gets the signal for which the ranks are to be ended, instead of being asked to stop.
        late: whether they were asked, and did not stop in time.
    """

    def __init__(self, caught: Sequence[int], seconds: float | None, reports: Path) -> None:
        self.ends: list[int] = []
        self.late = False
        self._caught = caught
        self._seconds = seconds
        self._reports = reports
        self._deadline: float | None = None
        self._told: set[int] = set()

    def ended_well(self, code: int | None) -> bool:
        """Whether a rank's exit code is that of one that has done what it was asked for."""
        return code == EXIT_OK or (code == EXIT_STOPPED and self._seconds is not None)

    def end_now(self, ranks: Mapping[int, subprocess.Popen[bytes]]) -> bool:
        """Passes a first request on to the ranks; returns whether they are to be ended instead.

        Args:
            ranks: those that still run.
        """
        if not self._caught:
            return False
        first = self._caught[0]
        if self._seconds is None or first not in STOP_SIGNALS:
            self.ends.append(first)
            return True
        for number in self._caught[1:]:
            if number == signal.SIGINT or number not in STOP_SIGNALS:
                self.ends.append(number)
                return True
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
            text = fresh_line(2) + request_heard(signal.Signals(first).name)
            print(text, file=sys.stderr, flush=True)  # noqa: T201
        self._pass_on(first, ranks)
        if time.monotonic() > self._deadline:
            self.ends.append(first)
            self.late = True
        return self.late

    def _pass_on(self, number: int, ranks: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """Tells each rank once it has begun to listen: its heart beats from then on."""
        for rank, process in ranks.items():
            if rank not in self._told and read_beat(self._reports, rank).count:
                self._told.add(rank)
                process.send_signal(number)
