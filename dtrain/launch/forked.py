"""One rank that the command itself forks off, so that a single process is supervised as several are, at no cost.

So does each rank that another launcher has started. The command has read its arguments and its config by then, and not
yet loaded torch: the child goes on from there as the rank, and nothing is started or imported twice. The parent stays
small, and becomes the supervisor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dtrain.errors import EXIT_FAILED, WorldError
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.monitor.exit_report import RankIdentity, fix_identity, write_report
from dtrain.launch.signals.lifeline import end_with_parent

_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "pudb")
_PAUSE_SECONDS = 0.01
_DESCRIPTORS = Path("/proc/self/fd") if sys.platform == "linux" else Path("/dev/fd")


def can_be_forked() -> bool:
    """Whether this process can fork off its rank: not where a debugger, a tracer or a profiler follows it.

    Nor where other threads run, which a child would not have.
    """
    return (
        hasattr(os, "fork")
        and sys.gettrace() is None
        and sys.getprofile() is None
        and not any(name in sys.modules for name in _DEBUGGERS)
        and threading.current_thread() is threading.main_thread()
        and threading.active_count() == 1
    )


class ForkedRank:
    """The child, with what a supervisor asks of a `subprocess.Popen`.

    Args:
        pid: of the child.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, the negative number of the signal that killed it, or None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns what `poll` does.

        Raises:
            subprocess.TimeoutExpired: it still runs after that many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the rank", timeout or 0.0)
            time.sleep(_PAUSE_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, as long as it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Fork:
    """Starts the rank; made before the supervisor opens anything.

    Args:
        work: what the child does as the rank; it never returns.
        facts: which rank it is.

    Attributes:
        facts: the same.
        apart: whether other ranks have supervisors of their own.
    """

    def __init__(self, work: Callable[[], None], facts: RankFacts) -> None:
        self.facts = facts
        self.apart = facts.size > 1
        self._work = work
        self._inherited = _open_descriptors()

    def __call__(self, reports: str, stdout: int, stderr: int) -> ForkedRank:
        """Forks the rank off.

        Args:
            reports: the folder where it leaves its report.
            stdout: its standard output.
            stderr: its standard error.

        Raises:
            WorldError: no further process can be started.
        """
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # what is buffered would be written twice
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            raise WorldError(
                f"the training process could not be started: {error.strerror}. See `ulimit -u` and the limits of the "
                "job or container; --no-supervisor trains without a second process."
            ) from None
        if pid:
            return ForkedRank(pid)
        leave = os._exit  # the work may replace it
        try:
            me = RankIdentity(self.facts.rank, self.facts.size, Path(reports), apart=self.apart)
            fix_identity(me)  # first, so that what fails from here on can be reported
            os.setsid()  # a terminal's Ctrl-C comes through the supervisor once
            end_with_parent(parent)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for descriptor in _open_descriptors() - self._inherited:
                _close(descriptor)
            if callable(signal.getsignal(signal.SIGHUP)):  # the others are held back until the rank hears them
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
            self._work()
        except BaseException as error:  # noqa: BLE001 - of dtrain's own, or of an exit function
            _report(error)
        finally:
            leave(EXIT_FAILED)  # it has not ended as it should


def _report(error: BaseException) -> None:
    """Reports what ended the rank where nothing else did; without a way to the supervisor, on the standard error."""
    try:
        from dtrain.launch.monitor.describe import explain

        found = explain(error)
        write_report(EXIT_FAILED, found.text, found.told)
    except BaseException:  # noqa: BLE001 - a full disk, say
        with contextlib.suppress(OSError):
            os.write(2, "".join(traceback.format_exception(error)).encode(errors="replace"))


def _open_descriptors() -> set[int]:
    return {int(path.name) for path in _DESCRIPTORS.iterdir()}


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # that of the listing itself
        os.close(descriptor)
