"""Forks beside threads that are not Python's: a DataLoader's workers in a rank whose process group is at work.

Python's fork in older versions (https://github.com/python/cpython/issues/112275) leaves a child that waits for ever
where another thread was just then making a thread state. torch's process group does that after each collective, to
release its tensors; a worker that is forked right behind one hangs about once in a thousand times.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time

_QUIET_SECONDS = 0.002  # within which a thread of the process group has done what it does after a collective


@functools.cache
def make_forks_safe() -> None:
    """From now on, where Python needs it, each fork waits until the process group's threads are likely to be idle."""
    if needs_care(sys.version_info[:3]):
        os.register_at_fork(before=_wait_for_threads)


def needs_care(version: tuple[int, ...]) -> bool:
    """Whether this version's fork can leave a child that hangs."""
    return version < (3, 10, 15) or (3, 11) <= version < (3, 11, 10)


def _wait_for_threads() -> None:
    time.sleep(_QUIET_SECONDS)
    # Starting a thread needs the lock in question too, and so waits for one that was interrupted while it held that.
    thread = threading.Thread(target=_nothing)
    thread.start()
    thread.join()


def _nothing() -> None: ...
