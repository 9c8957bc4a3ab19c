"""The launcher that has started a process as a rank, and whose end the rank's supervisor has to notice.

torchrun, Accelerate, SLURM and MPI end their ranks when they end themselves; not when they are killed. What they have
started is not told of that, and its parent may be another program in between (a shell, numactl), which lives on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from dtrain.launch.signals.owner import started_at

# Programs that start ranks on this machine and wait for their end.
_PROGRAMS = frozenset({
    *("torchrun", "accelerate", "accelerate-launch", "deepspeed", "horovodrun"),
    *("slurmstepd", "srun", "flux-shell", "jskd", "palsd"),
    *("mpirun", "mpiexec", "orterun", "prterun", "orted", "prted", "mpiexec.hydra", "hydra_pmi_proxy", "pmi_proxy"),
})  # fmt: skip
_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "accelerate.commands.accelerate_cli": "accelerate",
}
_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")  # Python's own options that take the next word


@dataclass(frozen=True)
class Launcher:
    """A process that has started this one, or one above it.

    Attributes:
        name: such as "torchrun".
        pid: its number.
        started: when it began, which tells it from a later process of that number.
    """

    name: str
    pid: int
    started: int

    def __str__(self) -> str:
        """Words such as "torchrun (pid 4711)"."""
        return f"{self.name} (pid {self.pid})"

    def lives(self) -> bool:
        """Whether it still runs."""
        return started_at(self.pid) == self.started


def launcher_above(pid: int, proc: Path = Path("/proc")) -> Launcher | None:
    """Returns the nearest launcher above a process; None where there is none that is known. Linux only.

    Args:
        pid: the process.
        proc: where the kernel shows processes.
    """
    if sys.platform != "linux":
        return None
    while (pid := _parent(proc, pid)) > 0:
        name = launcher_name(_argv(proc, pid))
        started = started_at(pid) if name else None
        if name and started is not None:
            return Launcher(name, pid, started)
    return None


def launcher_name(argv: Sequence[str]) -> str:
    """Returns the launcher that a command line runs, empty where it is anything else.

    Args:
        argv: the program and its words.
    """
    # slurmstepd calls itself "slurmstepd: [12.0]".
    program = PurePath(argv[0].partition(":")[0]).name if argv else ""
    if program.startswith("python"):
        program = _run_by_python(argv)
    return program if program in _PROGRAMS else ""


def _run_by_python(argv: Sequence[str]) -> str:
    """Returns the name of the script on Python's own command line, or of the launcher that a module of -m is."""
    for before, word, after in zip(argv, argv[1:], [*argv[2:], ""], strict=False):
        if word == "-m":
            return _MODULES.get(after, "")
        if word == "-c":
            break
        if not word.startswith("-") and before not in _WITH_VALUE:
            return PurePath(word).name
    return ""


def _argv(proc: Path, pid: int) -> list[str]:
    try:
        raw = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in raw.split(b"\0")]


def _parent(proc: Path, pid: int) -> int:
    """Returns the number of a process's parent; 0 where there is none, or it is not to be seen."""
    try:
        return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
