"""What Linux tells of processes in /proc and of memory in the cgroup; elsewhere it is not known."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Activity:
    """What a rank with all its threads and workers has used so far.

    Attributes:
        seconds: of CPU time.
        moved: bytes read and written.
        stuck_in_kernel: whether one of them waits for a disk or a network file system right now.
        stopped: whether the rank itself is stopped by a signal.
    """

    seconds: float = 0.0
    moved: int = 0
    stuck_in_kernel: bool = False
    stopped: bool = False


def family(pid: int) -> set[int]:
    """Returns a process and all that it started, as far as they still run."""
    found, new = {pid}, {pid}
    while new:
        new = {child for parent in new for child in _children(parent)} - found
        found |= new
    return found


def activity(pid: int) -> Activity | None:
    """Returns what a rank has used so far; None where this cannot be known, or the process is gone."""
    states = {member: _stat(member) for member in family(pid)}
    if states[pid] is None:
        return None
    known = {member: stat for member, stat in states.items() if stat is not None}
    return Activity(
        seconds=sum(seconds for _, seconds in known.values()),
        moved=sum(_moved(member) for member in known),
        stuck_in_kernel=any(state == "D" for state, _ in known.values()),
        stopped=known[pid][0] in "Tt",
    )


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def out_of_memory_kills() -> tuple[int, int]:
    """Returns how often memory ran out so far and a process was killed: in this cgroup, and on the whole machine."""
    try:
        cgroup = (_PROC / "self" / "cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        cgroup = ""
    files = (_CGROUP / cgroup / "memory.events", _CGROUP / "memory.events", _CGROUP / "memory" / "memory.oom_control")
    here = next((count for file in files if (count := _oom_kill(file)) is not None), 0)
    return here, _oom_kill(_PROC / "vmstat") or 0


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    try:
        for task in (_PROC / str(pid) / "task").iterdir():
            found |= {int(word) for word in (task / "children").read_text().split()}
    except OSError:  # it has just ended, or the kernel does not tell
        pass
    return found


def _stat(pid: int) -> tuple[str, float] | None:
    """Returns a process's state and its CPU seconds, those of children that it waited for included."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _moved(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "io").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines)
    return sum(int(counts.get(name, 0)) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def _oom_kill(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
