"""Starts the processes of a bench, with the same environment for all, and ends them again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

RANK = Path(__file__).resolve().with_name("rank.py")
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN_PREFIXES = ("DTRAIN_", "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "WANDB_", "MALLOC_", "OMP_", "MKL_")
_SAME_FOR_ALL = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    # Without these, glibc gives large blocks back and takes them again at each step, and timings scatter.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_TOP_PAD_": str(2**26),
}


def end_children_on_sigterm() -> None:
    """A SIGTERM then ends this process as Ctrl-C does: with its ranks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def run(launch: tuple[str, ...], words: list[str], env: dict[str, str], folder: Path, timeout: float) -> list[Any]:
    """Runs `rank.py WORDS FOLDER` under a launcher, its output in `folder/log`.

    Returns:
        what the ranks wrote, in rank order; an error alone where none did.
    """
    argv = [word.format(port=_free_port()) for word in launch]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*argv, str(RANK), *words, str(folder)],
            env=_environment() | env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        why = "ended without a word"
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            why = f"hung: no end after {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    told = [json.loads(file.read_text()) for file in folder.glob("rank-*.json")]
    aborted = _aborted(folder / "log")
    if aborted and any(one.get("error") for one in told):  # then the ranks tell of the lost connection alone
        return [{"rank": 0, "error": aborted}]
    return sorted(told, key=lambda one: one["rank"]) or [{"rank": 0, "error": _last_line(folder / "log") or why}]


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in _FOREIGN and not k.startswith(_FOREIGN_PREFIXES)}
    return kept | _SAME_FOR_ALL


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _aborted(log: Path) -> str:
    """What a rank said that ended in C++."""
    found = re.search(r"what\(\):\s*(.*)", log.read_text(errors="replace"))
    return "" if found is None else re.sub(r"\[enforce fail at \S+\] ", "", found[1])


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
