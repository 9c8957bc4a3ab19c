"""Limits of a machine that end a training in other words: what they are, and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SHARED = Path("/dev/shm")  # noqa: S108 - it is the thing to look at
# As torch's DataLoader says it of a worker, and as torch and multiprocessing say it themselves.
_SHARED_MEMORY = re.compile(
    r"out of shared memory|killed by signal: Bus error|unable to (?:mmap|allocate shared memory|open shared memory)"
    r"|No space left on device.*(?:/dev/shm|/torch_)|(?:/dev/shm|/torch_).*No space left on device"
    r"|unable to write to file </torch_",
    re.DOTALL,
)


def remedy_of(text: str, shared: Path = _SHARED) -> str:
    """Returns a line for what an exception's words mean; empty where they speak for themselves.

    Args:
        text: of the exception.
        shared: where shared memory is mounted.
    """
    if "AF_UNIX path too long" in text:
        return "\n  sockets take a path of 107 bytes at most: set TMPDIR to a shorter folder, such as /tmp"
    if not _SHARED_MEMORY.search(text):
        return ""
    try:
        stat = os.statvfs(shared)
        has = f"has {stat.f_blocks * stat.f_frsize >> 20} MiB, {stat.f_bavail * stat.f_frsize >> 20} of them free"
    except OSError:
        has = "is not there"
    return (
        f"\n  {shared}, through which DataLoader workers pass their batches, {has}: docker run --shm-size=8g (or "
        f"--ipc=host); in Kubernetes an emptyDir with medium: Memory at {shared}; or num_workers=0"
    )
