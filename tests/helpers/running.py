"""A command that runs while a test watches it and sends it signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.commands import BIN, clean_environment, popen

PATIENCE = 120.0


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Waits until something is true; fails where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.02)


@dataclass
class Running:
    """A process that was started by a test."""

    process: subprocess.Popen[bytes]
    folder: Path
    output: Path

    @property
    def text(self) -> str:
        """All that it has printed so far, on both streams."""
        return self.output.read_text()

    def send(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to the process, or to one of its ranks alone."""
        os.kill(self.process.pid if rank is None else self.rank(rank), number)

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                environment = process.environ()
                parent = psutil.Process(process.ppid()).environ()
            except psutil.Error:
                continue
            if environment.get("RANK") == str(rank) and "RANK" not in parent:
                return process.pid
        raise AssertionError(f"there is no rank {rank}")

    def until(self, *files: str) -> None:
        """Waits until the ranks have left all these files in the folder."""

        def there() -> bool:
            assert self.process.poll() is None, self.text
            return all((self.folder / file).exists() for file in files)

        wait_for(there, f"{files}")

    def end(self, seconds: float = PATIENCE) -> int:
        """Waits for the process and returns its exit code."""
        return self.process.wait(seconds)


@contextmanager
def running(folder: Path, *words: object, program: str = "dtrain", cold: bool = False, **env: str) -> Iterator[Running]:
    """Runs a command in a folder; what still runs at the end is killed.

    Args:
        folder: where.
        words: the command's.
        program: its name.
        cold: start it as users do, since its start-up is what is tested; see `helpers.warm`.
        env: more environment variables.
    """
    output = folder / "output"
    with output.open("wb") as file:
        process = popen(
            [str(BIN / program), *map(str, words)],
            cold=cold,
            cwd=folder,
            env=clean_environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Running(process, folder, output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
