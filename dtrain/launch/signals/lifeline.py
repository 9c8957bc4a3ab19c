"""A rank does not outlive its supervisor, however that one dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "DTRAIN_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | str | None = None) -> None:
    """Asks the kernel to kill this rank when its supervisor dies; does nothing without a supervisor.

    Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere `dtrain.launch.signals.reaper` alone does it.

    Args:
        parent: the supervisor's process id; None for what the environment says.
    """
    parent = os.environ.get(PARENT) if parent is None else parent
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
