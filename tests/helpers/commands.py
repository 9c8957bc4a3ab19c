"""Runs commands as a user would, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
MARK = "DTRAIN_TEST_PROCESS"
SERVERS: set[int] = set()  # processes that start others, and stay till the tests' end
# Variables with which the caller's own launcher or settings would reach into a test.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
# With it each part of a print() is a write of its own, and two ranks' lines run into each other.
_FOREIGN += ("PYTHONUNBUFFERED",)
_FOREIGN_PREFIXES = ("DTRAIN_", "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "WANDB_")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without anything that says how to train; with a mark to find left-over processes by."""
    kept = {k: v for k, v in os.environ.items() if k not in _FOREIGN and not k.startswith(_FOREIGN_PREFIXES)}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, MARK: str(os.getpid()), "PYTHONWARNINGS": "default", **more}


def children_of_tests() -> list[str]:
    """Command lines of processes that carry this test run's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid in SERVERS or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(os.getpid()):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except (psutil.Error, OSError):
            continue
    return found


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Dtrain:
    """The `dtrain` command, and launchers around it, in one folder."""

    folder: Path

    def __call__(self, *arguments: object, timeout: float = 120, **env: str) -> Done:
        return self.run(BIN / "dtrain", *arguments, timeout=timeout, **env)

    def run(self, *argv: object, timeout: float = 120, **env: str) -> Done:
        done = subprocess.run(
            [str(word) for word in argv],
            check=False,
            cwd=self.folder,
            env=clean_environment(**env),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: object, **env: str) -> subprocess.Popen[str]:
        """Starts `dtrain ARGUMENTS`, and leaves it to the caller to end it; what it prints is not kept."""
        return subprocess.Popen(
            [str(BIN / "dtrain"), *map(str, arguments)],
            cwd=self.folder,
            env=clean_environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run_folder(self) -> Path:
        """The one run's folder."""
        (folder,) = (self.folder / "runs").iterdir()
        return folder
