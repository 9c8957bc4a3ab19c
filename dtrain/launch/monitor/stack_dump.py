"""What each rank is doing: Python stacks, written by the rank itself when its supervisor asks for them.

faulthandler writes them from a signal handler in C, so that also a rank that hangs in C code answers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import keep_reserve
from dtrain.launch.monitor.exit_report import identity
from dtrain.launch.monitor.processes import catches, family
from dtrain.version import PACKAGE, RECIPES

ASK = getattr(signal, "SIGUSR2", None)  # SLURM and others use SIGUSR1
_ANSWER_SECONDS = 2.0
_MOST_WORKERS = 8

# Where a rank is while it waits for the others: in a collective, or in backward, where DDP averages gradients.
_WAITING = re.compile(
    r"torch/distributed/|torch/autograd/(graph|__init__)\.py|torch/nn/parallel/distributed\.py"
    r"|dtrain/(distributed/(world|standing|stopping)|engine/(agreed_steps|row_evidence)|data/count_exchange"
    r"|model/(ddp|gather|sync_batchnorm|gradients/(flat|agreement|drift|buffers)))\.py"
)
# Where it is at a debugger's prompt: pdb and those that are built on it, the one of IPython, of an editor.
_DEBUGGER = re.compile(r"/(pdb|bdb|cmd|code)\.py$|/(IPython|ipdb|pudb|debugpy|pydevd|_pydevd_\w+)/")
_MOST_PROMPT_FRAMES = 8
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\S+) in (?P<name>.*)$')
_PACKAGE = str(PACKAGE) + os.sep
_RECIPES = str(RECIPES) + os.sep
_FOLDED = re.compile(r"-packages/(torch|accelerate)/")
_WORKER = "\nworker "


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: str
    name: str

    def __str__(self) -> str:
        """Words such as "recipe.py:12, in train_step"."""
        return f"{self.file}:{self.line}, in {self.name}"


def listen() -> None:
    """Makes this rank write its stacks when asked, or when it crashes, and whole lines; able to tell of lack of memory.

    Without a supervisor, a crash is told on standard error, and that is all.
    """
    me = identity()
    if me.reports is None:
        with contextlib.suppress(ValueError, OSError, AttributeError, RuntimeError):  # there is none
            if not faulthandler.is_enabled():
                faulthandler.enable(all_threads=False)
        return
    keep_reserve()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what a rank has printed is seen, and not lost when it is killed
    # Descriptors, not file objects: they stay open until the process is gone.
    faulthandler.enable(_opened(_crash_file(me.reports, me.rank)), all_threads=False)
    if ASK is not None:
        faulthandler.register(ASK, _opened(_stacks_file(me.reports, me.rank)), all_threads=True)


def ask_for_stacks(folder: Path, ranks: dict[int, int]) -> dict[int, str]:
    """Returns what ranks answer that are asked for their stacks, and their DataLoader workers too.

    Args:
        folder: of the reports.
        ranks: rank -> process id.

    Returns:
        rank -> text; empty where it does not respond (it is stopped, say).
    """
    return {rank: _ask(_stacks_file(folder, rank), pid) for rank, pid in ranks.items()}


def main_stack(text: str) -> list[Frame]:
    """Returns the frames of the main thread of the first process in a text of stacks, innermost first."""
    blocks = re.split(r"\n(?=(?:Current thread|Thread) 0x)|\n\n", text.partition(_WORKER)[0].strip())
    return _frames(blocks[-1])


def busy_worker(text: str) -> list[Frame]:
    """Returns the frames of the first DataLoader worker in a text of stacks that is not waiting for something to do."""
    for worker in text.split(_WORKER)[1:]:
        frames = main_stack(worker)
        if any(frame.name == "fetch" for frame in frames):
            return frames
    return []


def users_part(frames: list[Frame]) -> str:
    """Returns the lines of a stack up to dtrain's call; frames of torch and Accelerate as one line that counts."""
    calls = [number for number, frame in enumerate(frames) if _is_ours(frame.file)]
    kept = frames[: calls[0]] if calls and calls[0] > 0 else frames
    lines: list[str] = []
    for package, group in itertools.groupby(kept, lambda frame: _package_of(frame.file)):
        some = list(group)
        lines += [f"  {frame}" for frame in some] if package is None else [f"  ... {len(some)} frames of {package}"]
    return "\n".join(lines)


def _package_of(file: str) -> str | None:
    match = _FOLDED.search(file)
    return None if match is None else match[1]


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE) and not file.startswith(_RECIPES)


def _frames(text: str) -> list[Frame]:
    # Without those of Python's import system: a module that hangs while it is imported is what matters.
    found = (Frame(**match.groupdict()) for line in text.splitlines() if (match := _FRAME.match(line)))
    return [frame for frame in found if not frame.file.startswith("<frozen importlib.")]


def waits_for_others(frames: list[Frame]) -> bool:
    """Whether a rank with these frames waits for other ranks."""
    return bool(frames) and _WAITING.search(frames[0].file) is not None


def at_debugger(frames: list[Frame]) -> bool:
    """Whether a rank with these frames waits for a person at a debugger's prompt."""
    return any(_DEBUGGER.search(frame.file) for frame in frames[:_MOST_PROMPT_FRAMES])


def raw_crash_text(folder: Path, rank: int) -> str:
    """Returns what faulthandler wrote as a rank crashed; empty where it did not."""
    try:
        return _crash_file(folder, rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def crash_text(folder: Path, rank: int) -> str:
    """Returns the same in the user's frames."""
    text = raw_crash_text(folder, rank)
    return f"{text.splitlines()[0]}, innermost frame first:\n{users_part(_frames(text))}" if text.strip() else ""


def _ask(file: Path, pid: int) -> str:
    answer = _ask_one(file, pid)
    for worker in sorted(family(pid) - {pid})[:_MOST_WORKERS]:
        told = _ask_one(file, worker)
        answer += f"{_WORKER}{worker}:\n{told}" if told else ""
    return answer


def _ask_one(file: Path, pid: int) -> str:
    """Asks one process; only one that listens, since the signal would kill another. A fork listens as its rank does."""
    if ASK is None or not catches(pid, ASK):
        return ""
    before = _size(file)
    try:
        os.kill(pid, ASK)
    except OSError:
        return ""
    deadline, last = time.monotonic() + _ANSWER_SECONDS, -1
    while time.monotonic() < deadline:
        time.sleep(0.05)
        size = _size(file)
        if size > before and size == last:
            break
        last = size
    return file.read_bytes()[before:].decode(errors="replace") if file.exists() else ""


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


def _crash_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.crash"
