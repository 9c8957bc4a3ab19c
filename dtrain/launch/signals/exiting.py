"""What keeps a process from its end, and what ends it behind dtrain's back."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from dtrain.errors import EXIT_FAILED

_MOST = 5


def pending_at_exit() -> list[str]:
    """Returns what this process would wait for if it came to its end now; empty where nothing keeps it."""
    main, here = threading.main_thread(), threading.current_thread()
    threads = [one for one in threading.enumerate() if one not in {main, here} and not one.daemon]
    found = [f"the thread {thread.name!r}, which is not a daemon" for thread in threads]
    found += [
        f"the child process {child.name!r} (pid {child.pid}) of multiprocessing"
        for child in children()
        if not child.daemon
    ]
    return [*found[:_MOST], f"{len(found) - _MOST} more"] if len(found) > _MOST else found


def children() -> list[Any]:
    """Returns the children of multiprocessing that still run."""
    module = sys.modules.get("multiprocessing.process")
    with contextlib.suppress(Exception):  # a thread may be at its list
        return [] if module is None else list(module.active_children())
    return []


def keep_exit_code(code: int) -> None:
    """From now on, what the process has come to is its exit code, whatever an exit function of the user's chooses.

    An os._exit(75) at the end of a run would have it started again, and an os._exit(0) hide that it failed.
    """
    leave, process = os._exit, os.getpid()

    def kept(status: int) -> None:
        if os.getpid() != process:  # a child that was forked off
            leave(status)
        if status != code:
            caller = sys._getframe(1)
            words = (
                f"dtrain: warning: os._exit({status}) was called as the process ended, in {caller.f_code.co_filename}:"
                f"{caller.f_lineno}; its exit code is {code} all the same, since that is what has become of the run.\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, words.encode(errors="replace"))
        leave(code)

    os._exit = kept  # type: ignore[assignment]


@contextlib.contextmanager
def report_os_exit() -> Iterator[None]:
    """While inside, an os._exit() of this process is said to be one, and ends it with exit code 1.

    It would else look like an end of dtrain's own: done (0), or stopped with all saved (75). A supervisor can tell that
    by itself, since the rank leaves no word.
    """
    leave, process = os._exit, os.getpid()

    def told(status: int) -> None:
        if os.getpid() == process:  # children that were forked off end so, too
            code = sys._getframe(1).f_code
            line = sys._getframe(1).f_lineno
            words = (
                f"dtrain: error: os._exit({status}) was called, which ends the process at once; the run can be resumed "
                f"from its last checkpoint. It was called in {code.co_filename}:{line}, in {code.co_name}\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, words.encode(errors="replace"))
            status = EXIT_FAILED
        leave(status)

    os._exit = told  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave


def reserve_standard_descriptors() -> None:
    """Puts the null device where the user's code has closed descriptor 0, 1 or 2.

    The next file to be opened would have that number, and get what is printed between its own lines.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened == number:
                os.set_inheritable(number, True)
            else:  # another thread was faster
                os.close(opened)
