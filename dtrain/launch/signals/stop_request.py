"""Requests to stop, as a process hears them: signals that set a flag, from its first moments on.

A supervisor passes a request on to its ranks by a file in the folder of their reports, which no code in a rank can
replace, ignore or block as it can a signal's handler.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import queue
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from dtrain.launch.monitor.exit_report import identity, jointly_supervised, supervised
from dtrain.launch.signals.handlers import Handlers, let_go
from dtrain.launch.terminal.guarded import write_now
from dtrain.launch.terminal.screen import fresh_line

_PASSED_ON, _PASSED_BYTES = "stop.txt", 32  # in the folder of the reports

# SIGUSR1 is what SLURM is usually told to send ahead of a time limit; SIGHUP, what a terminal sends that is closed.
# Windows has neither.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")

# A launcher passes a terminal's Ctrl-C on to ranks that got it from the terminal besides: no second one of a person's.
_SAME_SECONDS = 0.3

# What a scheduler sends to all processes of a job comes to a child and to its parent within so many seconds.
_TOGETHER_SECONDS = 0.3
_TIME = struct.Struct("<d")


class CtrlC(KeyboardInterrupt):
    """A person's second Ctrl-C, which ends this process; another KeyboardInterrupt is a failure of the user's code."""


def is_ctrl_c(error: BaseException) -> bool:
    """Whether an exception is a person's Ctrl-C, not one that the user's code has raised."""
    if isinstance(error, CtrlC):
        return True
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class StopRequest:
    """Whether this process was asked to stop, and by what. The first request counts, later ones change nothing.

    Args:
        impatient: whether a second Ctrl-C ends the process at once; where there is a launcher, that is its affair.
        tell: gets the name of the first request; it is called by a signal handler, or by any thread.
        reports: the folder where a supervisor passes requests on; None without one.

    Attributes:
        by: what asked, such as "SIGTERM"; None as long as nobody did.
        numbers: the signals that came.
    """

    def __init__(
        self, *, impatient: bool = False, tell: Callable[[str], None] = lambda _: None, reports: Path | None = None
    ) -> None:
        self.by: str | None = None
        self.numbers: list[int] = []
        self._impatient = impatient
        self._log = tell
        self._when = 0.0
        self._reports = reports
        self._handlers: Handlers | None = None
        self._process = os.getpid()
        self._came = mmap.mmap(-1, _TIME.size)  # when the last signal came; a process that is forked off sees it, too
        # Its put() may interrupt itself: it is meant for signal handlers, which Event.set() is not.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ask(self, by: str) -> None:
        """Asks to stop; safe in a signal handler, and in any thread."""
        if self.by is None:
            self.by, self._when = by, time.monotonic()
            self.wake()  # before anything is said, which may fail
            self._log(by)
        else:
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
            CtrlC: Ctrl-C, of somebody who asked before.
        """
        if os.getpid() != self._process:
            self._handle_in_child(number)
            return
        _TIME.pack_into(self._came, 0, time.monotonic())
        again = self.by is not None and time.monotonic() - self._when > _SAME_SECONDS
        if number == signal.SIGINT and self._impatient and again:
            raise CtrlC
        self.numbers.append(number)
        self.ask(signal.Signals(number).name)

    def _handle_in_child(self, number: int) -> None:
        """A process that was forked off has the handler by that.

        It ends by a SIGTERM that is sent to it alone, as Process.terminate() does. One that its parent got, too, is a
        scheduler's: the parent goes on to a checkpoint, and may need the child for that.
        """
        now = began = time.monotonic()
        while number == signal.SIGTERM and now - began < _TOGETHER_SECONDS:
            if abs(_TIME.unpack_from(self._came, 0)[0] - began) < _TOGETHER_SECONDS:
                return
            time.sleep(_TOGETHER_SECONDS / 10)
            now = time.monotonic()
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def install(self, handlers: Handlers) -> None:
        """Has handlers call `hear` from now on."""
        self._handlers = handlers
        handlers.set()

    def unblock_signals(self) -> None:
        """Lets signals come to the calling thread, should the main one block them."""
        if self._handlers is not None:
            self._handlers.unblock()

    def look(self) -> None:
        """Looks whether signals still come here, and whether a supervisor has passed a request on; for any thread."""
        if self._handlers is not None:
            self._handlers.keep()
        if self.by is None and self._reports is not None:
            by = read_stop_request(self._reports)
            if by:
                self.ask(by)

    def asked(self) -> str | None:
        """Returns what asked to stop, or None; also what came to a supervisor alone, before training looks for that."""
        self.look()
        return self.by


def prepare_stop_request(reports: Path) -> None:
    """Makes the file by which requests are passed on, so that a disk that is full later takes them, too."""
    with contextlib.suppress(OSError):  # it is full now: then it is made when it is needed
        (reports / _PASSED_ON).write_text(" " * _PASSED_BYTES, encoding="ascii")


def write_stop_request(reports: Path, by: str) -> None:
    """Passes a request on to all ranks of a supervisor."""
    descriptor = os.open(reports / _PASSED_ON, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, by.encode().ljust(_PASSED_BYTES), 0)
    finally:
        os.close(descriptor)


def read_stop_request(reports: Path) -> str:
    """Returns what asked a supervisor's ranks to stop; empty as long as nobody did."""
    try:
        return (reports / _PASSED_ON).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def hear_signals(request: StopRequest) -> None:
    """Turns the signals that ask to stop into a request, instead of dying of them, for the rest of this process.

    Signals are the main thread's alone; in any other nothing is heard. One that the process was started to ignore,
    as nohup and a shell's & do, stays ignored.
    """
    if threading.current_thread() is threading.main_thread():
        _keep_over_forks()
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        request.install(Handlers(heard, request.hear))


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


@functools.cache
def _keep_over_forks() -> None:
    """Has signals wait while a process is forked: Python forgets those that a child gets too early."""
    if not _CAN_BLOCK or not hasattr(os, "register_at_fork"):
        return
    before = threading.local()

    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock)


def hear_no_more() -> None:
    """Ignores further requests, of a process that is on its way out: the interpreter would die of them at its end."""
    if threading.current_thread() is threading.main_thread():
        let_go()
        for number in STOP_SIGNALS:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)


def request_of_this_process() -> StopRequest:
    """Makes this process, which may be a rank, hear what asks it to stop, and tell of it where nobody else does."""
    me = identity()
    impatient = me.size == 1 and not supervised()
    request = StopRequest(impatient=impatient, tell=_log if me.rank == 0 else lambda _: None, reports=me.reports)
    hear_signals(request)
    return request


def request_heard(by: str, *, alone: bool = True) -> str:
    """Returns what a person shall read when a request to stop was heard.

    Args:
        by: what asked.
        alone: whether a second Ctrl-C comes to the one who says this, too.
    """
    return (
        f"dtrain: stopping on request ({by}), saving a "
        f"checkpoint{'; press Ctrl-C again to stop at once' if alone else ''}."
    )


def _log(by: str) -> None:
    if not jointly_supervised():
        line = request_heard(by, alone=identity().size == 1)
        # At once, and also from within another print(); a terminal shows ^C or a bar in this line. Whoever reads the
        # output may have got the same Ctrl-C, and be gone.
        write_now(2, f"{fresh_line(2)}{line}\n")
