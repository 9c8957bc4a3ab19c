"""What a supervisor does about signals: it asks ranks that know how to, once, to stop; or it ends them.

It does so, too, where the launcher that has started it as a rank is killed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from dtrain.errors import EXIT_OK, EXIT_STOPPED
from dtrain.launch.monitor.exit_report import Report
from dtrain.launch.signals.launcher import Launcher
from dtrain.launch.signals.stop_request import STOP_SIGNALS, prepare_stop_request, request_heard, write_stop_request
from dtrain.launch.terminal.guarded import say
from dtrain.launch.terminal.screen import fresh_line

# To save a checkpoint, after the launcher above was killed: whoever starts the job again needs its GPUs.
_ORPHAN_SECONDS = 10.0
_HANG_UP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()


@contextlib.contextmanager
def signals_caught(*, stoppable: bool = False, before: Sequence[int] = ()) -> Iterator[list[int]]:
    """Notes signals instead of dying of them: SIGINT, SIGTERM and SIGHUP.

    Signals are the main thread's alone; in any other there is nothing to note. One that the process was started to
    ignore, as nohup does with SIGHUP, stays ignored; but for SIGCHLD, without which no child has an exit code.

    Args:
        stoppable: whether the ranks know how to stop on request; then SIGUSR1 is a request, too.
        before: signals that came before this.
    """
    caught = list(before)
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    wanted = set(STOP_SIGNALS) if stoppable else {signal.SIGINT, signal.SIGTERM, *_HANG_UP}
    found = {number: signal.getsignal(number) for number in wanted}
    found = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in found:
        signal.signal(number, note)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # of a daemon that started this; no rank had an exit code
        found[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield caught
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


class Escalation:
    """Follows the signals that a supervisor caught.

    Args:
        caught: gets the signals that come.
        seconds: how long the ranks may take to stop on request; None where they do not know how to.
        reports: the folder of the ranks' reports, where requests are passed on.
        launcher: what has started this process as a rank, and is not to be outlived; None for nothing.
        silent: whether the ranks themselves say that they are stopping.

    Attributes:
        ends: gets the signal for which the ranks are to be ended, instead of being asked to stop.
        late: whether they were asked, and did not stop in time.
        orphaned_by: the launcher, if its end is why they were asked.
    """

    def __init__(
        self,
        caught: Sequence[int],
        seconds: float | None,
        reports: Path,
        *,
        launcher: Launcher | None = None,
        silent: bool = False,
    ) -> None:
        self.ends: list[int] = []
        self.late = False
        self.orphaned_by: Launcher | None = None
        self._launcher = launcher
        self._silent = silent
        self._caught = caught
        self._seconds = seconds
        self._reports = reports
        self._deadline: float | None = None
        prepare_stop_request(reports)

    def ended_well(self, code: int | None, report: Report | None) -> bool:
        """Whether a rank has done what it was asked for.

        Args:
            code: its exit code, which the user's code may have chosen (os._exit): the report vouches for it.
            report: what it left as its last word.
        """
        if report is None or report.exit_code != code:
            return False
        return code == EXIT_OK or (code == EXIT_STOPPED and self._seconds is not None)

    def end_now(self) -> bool:
        """Passes a first request on to the ranks; returns whether they are to be ended instead."""
        if not self._caught:
            return self._outlives_launcher()
        first = self._caught[0]
        if self._seconds is None or first not in STOP_SIGNALS:
            self.ends.append(first)
            return True
        for number in self._caught[1:]:
            if number == signal.SIGINT or number not in STOP_SIGNALS:
                self.ends.append(number)
                return True
        if self._deadline is None:
            name = signal.Signals(first).name
            self._ask(name, self._seconds)
            if not self._silent:
                say(fresh_line(2) + request_heard(name))
        return self._is_late(first)

    def _outlives_launcher(self) -> bool:
        """Asks the rank to stop once its launcher was killed; returns whether it is to be ended instead."""
        if self._launcher is None or (self._deadline is None and self._launcher.lives()):
            return False
        if self._deadline is None:
            self.orphaned_by = self._launcher
            seconds = min(_ORPHAN_SECONDS, self._seconds or 0.0)
            self._ask(f"end of {self._launcher.name}", seconds)
            say(
                f"{fresh_line(2)}dtrain: {self._launcher}, which started this rank, was killed: stopping within "
                f"{seconds:g} s."
            )
        return self._is_late(signal.SIGTERM)

    def _ask(self, by: str, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        write_stop_request(self._reports, by)  # not by a signal, whose handler may be another one by now

    def _is_late(self, number: int) -> bool:
        assert self._deadline is not None  # noqa: S101 - for the type checker
        if time.monotonic() > self._deadline:
            self.ends.append(number)
            self.late = True
        return self.late
