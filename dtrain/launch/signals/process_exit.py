"""How a rank leaves: without tearing the interpreter down, and within a time."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from dataclasses import replace
from typing import NoReturn

from dtrain.launch.monitor.exit_report import identity, supervised
from dtrain.launch.monitor.processes import Activity, activity
from dtrain.launch.signals.exiting import children, keep_exit_code, pending_at_exit

_patience: list[float] = []
_LONGER = 11  # times, after which the process ends without a word: it is given ten times as long to do its work
_CHILD_SECONDS = 1.0  # for what is done after a child that was waited for has ended


def must_leave_at_once() -> bool:
    """Whether this process is one of several ranks and has torch's process groups loaded."""
    return identity().size > 1 and "torch.distributed" in sys.modules


def leave(code: int) -> NoReturn:
    """Ends a rank: threads are waited for (where all went well), exit functions run, streams are flushed; no more.

    gloo's threads may still hold tensors then, ask for the interpreter's lock, and abort the process
    ("terminate called without an active exception"), after a run that went well.
    """
    if code == 0:
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def set_exit_timeout(seconds: float) -> None:
    """Says how long this process may stand still at its end, or be at work ten times as long; 0 is for ever."""
    _patience[:] = [seconds]


def enforce_exit(code: int) -> None:
    """Has this process exit at last, and with its exit code; a supervisor sees itself to ranks that something keeps.

    Args:
        code: the exit code, which is known by now.
    """
    keep_exit_code(code)
    seconds = _patience[0] if _patience else 0.0
    if seconds and not supervised():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        with contextlib.suppress(
            OSError, ValueError, ArithmeticError, AttributeError, RuntimeError
        ):  # no standard error
            # No thread of Python's can do it where code below Python hangs with the interpreter's lock.
            faulthandler.dump_traceback_later(_LONGER * seconds, exit=True)
        threading.Thread(target=_force, args=(code, seconds), name="dtrain-exit", daemon=True).start()


def did_not_exit(who: str, kept: str) -> str:
    """Returns what to say of a process that has done its work, and is ended.

    Args:
        who: such as "rank 1", or "the process".
        kept: what it waited for.
    """
    return (
        f"dtrain: warning: {who} had finished but did not exit for train.hang_seconds; it was ended. It waited "
        f"for {kept}. Make threads daemons (daemon=True), or end them and child processes when training has ended."
    )


class _Used:
    """What this process has used so far, without what it takes to look at that."""

    def __init__(self) -> None:
        self._read = 0

    def __call__(self, pid: int) -> Activity | None:
        first, second = activity(pid), activity(pid)
        if first is None or second is None:
            return None
        self._read += 2 * (second.moved - first.moved)
        return replace(second, seconds=second.seconds - time.thread_time(), moved=second.moved - self._read)


def _force(code: int, seconds: float) -> None:
    from dtrain.launch.monitor.hang_watch import ExitWatch

    watch, me = ExitWatch(seconds, seconds, used=_Used()), os.getpid()
    while not watch.overdue({0: me}, {0: True}):
        time.sleep(min(1.0, seconds / 20))
    kept = "; ".join(pending_at_exit()) or "an exit function"
    with contextlib.suppress(OSError):
        os.write(2, f"{did_not_exit('this process', kept)}\n".encode(errors="replace"))
    for child in children():
        with contextlib.suppress(Exception):
            child.kill()
    time.sleep(_CHILD_SECONDS)
    os._exit(code)
