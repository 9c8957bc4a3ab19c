"""NVIDIA GPUs and their driver, as nvidia-smi tells, without torch."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.launch.env.hardware import gpu_count
from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.words import MIB, many, size

NAME = "GPUs"
_QUERY = "name,driver_version,memory.total,memory.used,compute_mode"
_TIMEOUT = 15
_BUSY = 0.1


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: its model.
        driver: the driver's version.
        total: bytes of its memory, 0 where that is not told.
        used: how many of them are taken now.
        mode: "Default", "Exclusive_Process" or "Prohibited".
    """

    name: str
    driver: str
    total: int
    used: int
    mode: str


@dataclass(frozen=True)
class Gpus:
    """All GPUs of this machine.

    Attributes:
        listed: those that nvidia-smi lists.
        visible: how many a rank would see: CUDA_VISIBLE_DEVICES holds.
        trouble: why nvidia-smi told nothing, although there are some.
    """

    listed: tuple[Gpu, ...] = ()
    visible: int = 0
    trouble: str = ""

    def __str__(self) -> str:
        """Words such as "8 x NVIDIA H100 80GB HBM3, driver 550.54"."""
        models = list(dict.fromkeys((one.name, one.driver) for one in self.listed))
        counts = [sum((one.name, one.driver) == model for one in self.listed) for model in models]
        return ", ".join(f"{n} x {name}, driver {driver}" for n, (name, driver) in zip(counts, models, strict=True))


def find_gpus(environ: Mapping[str, str] | None = None) -> Gpus:
    """Asks nvidia-smi.

    Args:
        environ: where CUDA_VISIBLE_DEVICES is read; by default the process's.
    """
    visible = gpu_count(environ)
    program = shutil.which("nvidia-smi")
    if program is None:
        return Gpus(visible=visible, trouble="nvidia-smi is not on PATH" if gpu_count({}) else "")
    try:
        done = subprocess.run(
            [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Gpus(visible=visible, trouble=f"nvidia-smi: {error}")
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Gpus(visible=visible, trouble=f"nvidia-smi: {said[0] if said else f'exit code {done.returncode}'}")
    return Gpus(tuple(_parse(done.stdout.splitlines())), visible)


def _parse(lines: Sequence[str]) -> list[Gpu]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    return [Gpu(row[0], row[1], _mib(row[2]), _mib(row[3]), row[4]) for row in rows if len(row) == 5]


def _mib(text: str) -> int:
    return int(text) * MIB if text.isdigit() else 0  # "[N/A]" on machines whose memory is shared


def check_gpus(gpus: Gpus, environ: Mapping[str, str] | None = None) -> Finding:
    """Judges what was found of GPUs."""
    env = os.environ if environ is None else environ
    if gpus.trouble:
        remedy = "load the driver that fits the kernel (modprobe nvidia; a reboot after an update), then: nvidia-smi"
        return Finding(NAME, "fail", gpus.trouble, remedy)
    if not gpus.listed:
        return Finding(NAME, "skip", "none: ranks compute on the CPU")
    words = str(gpus)
    barred = [index for index, one in enumerate(gpus.listed) if one.mode == "Prohibited"]
    if barred:
        return Finding(
            NAME,
            "fail",
            f"{words}; GPU {barred[0]} is in compute mode Prohibited",
            f"nvidia-smi -i {barred[0]} -c DEFAULT",
        )
    if gpus.visible < len(gpus.listed):
        words = f"{words}; {gpus.visible} visible (CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES', '')})"
        return passed(NAME, words) if gpus.visible else Finding(NAME, "warn", words, "unset CUDA_VISIBLE_DEVICES")
    busy = [(index, one) for index, one in enumerate(gpus.listed) if one.total and one.used > _BUSY * one.total]
    if busy:
        told = ", ".join(f"GPU {index}: {size(one.used)} of {size(one.total)}" for index, one in busy)
        words = f"{words}; in use already: {told}"
        return Finding(NAME, "warn", words, "check who uses them (nvidia-smi), or exclude them: CUDA_VISIBLE_DEVICES")
    return passed(NAME, words)


def default_ranks(gpus: Gpus) -> int:
    """Returns how many ranks the checks start without -n: one for each of several GPUs, else two."""
    return max(2, gpus.visible)


def told(gpus: Gpus) -> str:
    """Returns the words of a table's cell."""
    return gpus.trouble or str(gpus) or many(0, "GPU")
