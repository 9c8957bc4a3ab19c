"""Processes that own a run's folder, or try to, and what a dead owner leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dtrain.launch.signals.owner import Owner
from dtrain.layout import OWNER
from helpers.commands import clean_environment

# Comes at a common moment, and says whether it got the folder; keeps it until it may go.
STARTER = """
import sys, time
from pathlib import Path
from dtrain.rundir import lock
if "nolocks" in sys.argv:
    import errno
    def flock(*_): raise OSError(errno.ENOLCK, "no locks")
    lock.fcntl.flock = flock
if "alone" in sys.argv:  # as on a network file system where each host's locks are its own
    lock.fcntl.flock = lambda *_: None
if "hosts" in sys.argv:  # each process on a host of its own
    import os
    from dtrain.launch.signals import owner
    owner.machine = lambda: f"host {os.getpid()}"
    lock._BEAT_SECONDS, lock._STALE_SECONDS = 0.1, 1.5
from dtrain.errors import UsageError
folder, begin = Path(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
time.sleep(max(0, begin - time.time()))
try:
    with lock.owned(folder):
        print("mine", flush=True)
        sys.stdin.readline()
except UsageError as error:
    print(error, flush=True)
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=30)


def left_by(folder: Path, **more: Any) -> Owner:
    """Words of an owner that is gone."""
    owner = replace(Owner.me(), token="gone", **more)
    (folder / OWNER).write_text(json.dumps(asdict(owner)))
    return owner


def claimed_by(folder: Path, name: str, token: str) -> None:
    """Leaves a claim of a process that has ended."""
    (folder / name).write_text(json.dumps(asdict(replace(Owner.me(), pid=1 << 22, token=token))))
