"""Plays a beginner's first minutes: `dtrain init`, then what it prints as next. It needs the standard library alone.

`python -m helpers.first_minutes FOLDER` does so for each template, with the dtrain that is installed beside that Python.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEMPLATES = ("function", "script", "keras", "text", "tabular", "image-folder")
ON_TWO_RANKS = ("function", "script")  # of which CI runs all commands, and of the others the first
_PROMISE = re.compile(r"Expected: (\w+) of at least ([\d.]+) after (\d+) epochs")


@dataclass(frozen=True)
class Promise:
    """What a comment says that a run comes to."""

    column: str
    least: float
    epochs: int

    def value_in(self, history: Path) -> float:
        """What a run came to; fails where that is less, or where it has another number of epochs."""
        with history.open(newline="") as file:
            last = list(csv.DictReader(file))[-1]
        value = float(last[self.column])
        assert int(last["epoch"]) == self.epochs, f"{history}: {last['epoch']} epochs, and not {self.epochs}"
        assert value >= self.least, f"{history}: {self.column} = {value}, and not at least {self.least}"
        return value


def read_promise(*files: Path) -> Promise:
    """The one promise that these files hold."""
    ((column, least, epochs),) = [found for file in files for found in _PROMISE.findall(file.read_text())]
    return Promise(column, float(least), int(epochs))


@dataclass(frozen=True)
class Played:
    """A command that kept the promise."""

    template: str
    command: str
    promise: Promise
    value: float
    seconds: float


def play(template: str, folder: Path, environ: dict[str, str], most: int | None = None) -> Iterator[Played]:
    """Writes a template into an empty folder, and runs what is printed as next, word for word.

    Args:
        template: its name.
        folder: where, in a folder of its own.
        environ: the commands' environment; its PATH says which dtrain.
        most: only so many of the commands that train.
    """
    printed = _run(["dtrain", "init", "mine", "--template", template], folder, environ)
    change, *commands = [line.strip() for line in printed.partition("next:")[2].strip().splitlines()]
    assert change == "cd mine", printed
    mine = folder / "mine"
    promise = read_promise(*mine.iterdir())
    for command in commands[:most]:
        before, began = set(mine.glob("runs/*/history.csv")), time.monotonic()
        _run(shlex.split(command), mine, environ)
        (history,) = set(mine.glob("runs/*/history.csv")) - before
        yield Played(template, command, promise, promise.value_in(history), time.monotonic() - began)


def _run(argv: list[str], folder: Path, environ: dict[str, str]) -> str:
    found = shutil.which(argv[0], path=environ["PATH"])
    assert found is not None, f"there is no {argv[0]} on the PATH"
    done = subprocess.run(
        [found, *argv[1:]], cwd=folder, env=environ, capture_output=True, text=True, timeout=240, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{shlex.join(argv)} in {folder}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    assert done.stderr == "", done.stderr
    return done.stdout


def main(folder: Path) -> None:
    """Plays all templates and prints what they came to."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    for template in TEMPLATES:
        (folder / template).mkdir(parents=True)
        for one in play(template, folder / template, environ, None if template in ON_TWO_RANKS else 1):
            reached = f"{one.promise.column} {one.value:.3f} (at least {one.promise.least})"
            print(f"{template:<13} {one.command:<37} {reached:<36} {one.seconds:4.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
