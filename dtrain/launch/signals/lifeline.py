"""A rank does not outlive its supervisor, however that one dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PARENT = "DTRAIN_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | str | None = None) -> None:
    """Asks the kernel to kill this rank when its supervisor dies; does nothing without a supervisor.

    A rank may be started by a script that the supervisor has started: then it dies with that script, which dies with
    the supervisor. Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere `dtrain.launch.signals.reaper` alone does it.

    Args:
        parent: the supervisor's process id; None for what the environment says.
    """
    parent = os.environ.get(PARENT) if parent is None else parent
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _descends_from(int(parent)):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _descends_from(ancestor: int) -> bool:
    process = os.getppid()
    while process > 1 and process != ancestor:
        process = _parent_of(process)
    return process == ancestor


def _parent_of(process: int) -> int:
    """Returns a process's parent, 0 where it has ended meanwhile."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
