"""Who has something, in words that outlive it: a process that is told from any other, of this machine or of another."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_LONGEST = 255  # characters of a text
_LATEST = 1 << 40  # seconds since the epoch, and more than any process has as a number


@dataclass(frozen=True)
class Owner:
    """Who has a folder.

    Attributes:
        host: name of the machine.
        pid: number of the process.
        started: when that process began, in the kernel's ticks since the boot: a number may be used again.
        machine: what tells this boot of this machine, and this container, from any other.
        job: the scheduler's, or None.
        since: seconds since the epoch.
        token: tells two owners apart that are alike in all else.
    """

    host: str
    pid: int
    started: int
    machine: str
    job: str | None
    since: float
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        job = next((os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)), None)
        return cls(socket.gethostname(), os.getpid(), started_at(os.getpid()) or 0, machine(), job, time.time())

    @classmethod
    def parse(cls, text: str | bytes) -> Owner | None:
        """Reads what `json.dumps(asdict(owner))` wrote; None where it is anything else, or values are out of range."""
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (found.host, found.machine, found.token, *([] if found.job is None else [found.job]))
        if not all(isinstance(one, str) and len(one) <= _LONGEST and one.isprintable() for one in texts):
            return None
        counts = all(type(one) is int and 0 <= one < 1 << 63 for one in (found.pid, found.started))
        since = type(found.since) in (int, float) and math.isfinite(found.since) and 0 <= found.since < _LATEST
        return found if counts and since else None

    def __str__(self) -> str:
        """Words such as "process 4711 on node7 (job 99), since 2026-01-31 12:00:00"."""
        job = f" (job {self.job})" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}"

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process that this one can see."""
        return self.machine == machine()

    def lives(self) -> bool:
        """Whether an owner that is here still runs; a number that was given to another process since does not count.

        Nor does one that was killed and has yet to notice, since it waits for a disk: its end is waited for.
        """
        return started_at(self.pid) == self.started and not is_killed(self.pid)


def started_at(pid: int) -> int | None:
    """Returns when a process began, in ticks since the boot; None where there is none, 0 where this is not known.

    One that has ended, and that its parent has not asked after yet, is none.
    """
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if facts[0] in ("Z", "X") else int(facts[19])
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def is_killed(pid: int, facts: Path = Path("/proc")) -> bool:
    """Whether a SIGKILL waits for a process."""
    try:
        lines = (facts / str(pid) / "status").read_text().splitlines()
    except OSError:
        return False
    waiting = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(signals >> (signal.SIGKILL - 1) & 1 for signals in waiting)


def machine() -> str:
    """What tells this boot of this machine, and this container's processes, from any other's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
