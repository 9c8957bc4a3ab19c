"""Runs commands as a user would, in real processes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dtrain.launch.env.threads import usable_cores
from helpers import warm
from helpers.sweep import FULL

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
    # A thread that waits for another one sleeps: where more is at work than there are cores, the other waits for this one.
    ours = {"PATH": path, MARK: str(os.getpid()), "PYTHONWARNINGS": "default", "OMP_WAIT_POLICY": "passive"}
    return {**kept, **ours, **more}


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


def popen(argv: list[str], *, cold: bool = False, **how: Any) -> subprocess.Popen[Any]:
    """Starts a program as `subprocess.Popen` does: `dtrain` and scripts of torch's warm, but for the first of each kind.

    Args:
        argv: the program's name and its words.
        cold: start it as users do, whatever it is; see `helpers.warm`.
        how: as for `subprocess.Popen`.
    """
    ours = argv[0] in (str(BIN / "dtrain"), "python", sys.executable)
    first = argv[1:2] if argv[0] == str(BIN / "dtrain") else []  # the verb
    kind = (argv[0], *first, *sorted({"-n", "--cpu"} & {*argv}))
    if ours and not (cold or COLD) and kind in _STARTED and is_warm():
        STARTS["warm" if warm.suits(how.get("env")) else "unsuited"] += 1
        if argv[0] == str(BIN / "dtrain") and argv[1:2] != ["launch"]:
            return warm.Popen(argv, **how)
        warm_for_scripts()
        return warm.ScriptPopen(argv, **how)
    process = subprocess.Popen(argv, **how)
    _STARTED.add(kind)
    return process


_AT_FIRST = clean_environment()  # a test may change it for a while
_STARTED: set[tuple[str, ...]] = set()
STARTS = {"warm": 0, "unsuited": 0}  # the second kind was to be warm, but for its environment
COLD = FULL or os.environ.get("DTRAIN_TEST_WARM") == "0"


@functools.cache
def is_warm() -> bool:
    """Has a warm process, for as long as these tests run; returns whether there is one."""
    if sys.platform != "linux":
        return False
    made = warm.connect({**_AT_FIRST, "OMP_NUM_THREADS": str(usable_cores())})
    if made is None:
        return False
    warm.Popen.warm, process = made
    SERVERS.add(process)
    return True


@functools.cache
def warm_for_scripts() -> None:
    """Has a second warm process, in which what optimizers import is there; only where there is the first."""
    assert warm.Popen.warm is not None
    warm.ScriptPopen.warm, process = warm.Popen.warm.with_more(warm.SCRIPTS_MODULES)
    SERVERS.add(process)


@dataclass(frozen=True)
class Dtrain:
    """The `dtrain` command, and launchers around it, in one folder.

    Attributes:
        folder: where it runs.
        is_cold: it is always started as a user would; see `helpers.warm`.
    """

    folder: Path
    is_cold: bool = False

    @property
    def cold(self) -> Dtrain:
        """The same, always started as a user would."""
        return replace(self, is_cold=True)

    def __call__(self, *arguments: object, timeout: float = 200, **env: str) -> Done:
        return self.run(BIN / "dtrain", *arguments, timeout=timeout, **env)

    def run(self, *argv: object, timeout: float = 200, **env: str) -> Done:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        words = [str(word) for word in argv]
        with popen(words, cold=self.is_cold, cwd=self.folder, env=clean_environment(**env), **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return Done(process.returncode, out, err)

    def start(self, *arguments: object, **env: str) -> subprocess.Popen[str]:
        """Starts `dtrain ARGUMENTS`, and leaves it to the caller to end it; what it prints is not kept."""
        return popen(
            [str(BIN / "dtrain"), *map(str, arguments)],
            cold=self.is_cold,
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
