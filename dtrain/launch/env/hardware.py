"""The GPUs that this machine has, as far as can be seen without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_DEVICES = Path("/dev")


def gpu_count(environ: Mapping[str, str] | None = None) -> int:
    """Returns the number of NVIDIA GPUs that a rank would see; CUDA_VISIBLE_DEVICES is respected."""
    env = os.environ if environ is None else environ
    visible = env.get("CUDA_VISIBLE_DEVICES")
    there = len(list(_DEVICES.glob("nvidia[0-9]*"))) or _listed_gpus()
    if visible is None or not there:
        return there
    count = 0
    for name in visible.split(","):
        if not name.strip() or name.strip().startswith("-"):
            break  # CUDA takes no notice of what follows an invalid entry
        count += 1
    return count


def _listed_gpus() -> int:
    """Asks nvidia-smi: under WSL there are GPUs without device files of their own."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
