"""DataLoader workers outlive a request to stop: schedulers send it to every process, and a rank needs its workers for
the step that it stops after."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from dtrain.launch.signals.stop_request import STOP_SIGNALS, StopRequest


def shielded(worker_init: Callable[[int], Any] | None) -> Callable[[int], Any] | None:
    """Returns what a DataLoader's workers shall do first, in a process that hears requests to stop; else as it was."""
    hears = isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), StopRequest)
    return _Shielded(worker_init) if hears and sys.platform == "linux" else worker_init


class _Shielded:
    """A `worker_init_fn` that can be pickled.

    Args:
        then: the user's own, or None.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        for number in STOP_SIGNALS:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        # The rank itself ends a worker by SIGTERM. Who sent it, only sigwaitinfo() tells, and it does so only where no
        # thread is there already that would take the signal: in a worker that was forked, not spawned.
        if len(os.listdir("/proc/self/task")) == 1:  # noqa: PTH208
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=_obey_parent, args=(os.getppid(),), name="dtrain-shield", daemon=True).start()
        if self._then is not None:
            self._then(worker)


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
