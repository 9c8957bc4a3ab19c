"""Requests to stop, as a process hears them: signals that set a flag, from its first moments on."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from dtrain.launch.reports import supervised
from dtrain.launch.screen import fresh_line

FILE_NAME = "STOP"  # in the run's folder

# SIGUSR1 is what SLURM is usually told to send ahead of a time limit. Windows has none.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")

# A launcher passes a terminal's Ctrl-C on to ranks that got it from the terminal besides: no second one of a person's.
_SAME_SECONDS = 0.3


class StopRequest:
    """Whether this process was asked to stop, and by what. The first request counts, later ones change nothing.

    Args:
        impatient: whether a second Ctrl-C ends the process at once; where there is a launcher, that is its affair.
        tell: gets the name of the first request; it is called by a signal handler, or by any thread.

    Attributes:
        by: what asked, such as "SIGTERM"; None as long as nobody did.
        numbers: the signals that came.
    """

    def __init__(self, *, impatient: bool = False, tell: Callable[[str], None] = lambda _: None) -> None:
        self.by: str | None = None
        self.numbers: list[int] = []
        self._impatient = impatient
        self._tell = tell
        self._when = 0.0
        self._process = os.getpid()
        # Its put() may interrupt itself: it is meant for signal handlers, which Event.set() is not.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ask(self, by: str) -> None:
        """Asks to stop; safe in a signal handler, and in any thread."""
        if self.by is None:
            self.by, self._when = by, time.monotonic()
            self._tell(by)
        self.wake()

    def wake(self) -> None:
        """Lets a `wait` return."""
        self._news.put(None)

    def wait(self, seconds: float) -> None:
        """Waits until there is news, some seconds at most."""
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=seconds)
            while True:  # of a storm one is enough
                self._news.get_nowait()

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            KeyboardInterrupt: Ctrl-C, of somebody who asked before.
        """
        if os.getpid() != self._process:
            return  # it was forked off, and has this handler by that
        again = self.by is not None and time.monotonic() - self._when > _SAME_SECONDS
        if number == signal.SIGINT and self._impatient and again:
            raise KeyboardInterrupt
        self.numbers.append(number)
        self.ask(signal.Signals(number).name)


def hear_signals(request: StopRequest) -> None:
    """Turns the signals that ask to stop into a request, instead of dying of them, for the rest of this process.

    Signals are the main thread's alone; in any other nothing is heard. One that the process was started to ignore,
    as nohup and a shell's & do, stays ignored.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, request.hear)
        if _CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def kept_for_later() -> Iterator[None]:
    """Holds requests to stop back for what is started meanwhile: it gets them once it hears them (`hear_signals`).

    SLURM sends them to every process of a job, and one that is still starting up would die of them.
    """
    if not _CAN_BLOCK:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_no_more() -> None:
    """Ignores further requests, of a process that is on its way out: the interpreter would die of them at its end."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)


def request_of_this_process() -> StopRequest:
    """Makes this process, which may be a rank, hear what asks it to stop, and tell of it where nobody else does."""
    rank, alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
    request = StopRequest(impatient=alone and not supervised(), tell=_tell if rank == "0" else lambda _: None)
    hear_signals(request)
    return request


def request_heard(by: str, *, alone: bool = True) -> str:
    """Returns what a person shall read when a request to stop was heard.

    Args:
        by: what asked.
        alone: whether a second Ctrl-C comes to the one who says this, too.
    """
    return f"dtrain: stopping on request ({by}), with a checkpoint{'; Ctrl-C again ends at once' if alone else ''}."


def _tell(by: str) -> None:
    if not supervised():
        line = request_heard(by, alone=os.environ.get("WORLD_SIZE", "1") == "1")
        # At once, and also from within another print(); a terminal shows ^C or a bar in this line.
        os.write(2, f"{fresh_line(2)}{line}\n".encode())
