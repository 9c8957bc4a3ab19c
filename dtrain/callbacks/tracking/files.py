"""What a tracked run has in its folder, `tracking/`: values and facts that outlive any kill, the trackers' run ids.

::

    steps.jsonl   a JSON object a line: the values of now, at most one a second;
                  {"row": 3, "updates": 270, "at": ...}: the epoch's row was appended to history.csv then;
                  {"firm": 3}: and is not computed again by a run that goes on, since a checkpoint holds it
    about.json    what trackers are told of the run once: name, config, versions, the net's size
    ids.json      tracker's name -> the id of its run
    end.json      how the run ended; empty as long as it trains, and where it was killed

Standard library only: who sends the values need not load torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.files import make_folder, open_below, read_below, write_below
from dtrain.layout import TRACKING

STEPS, ABOUT, IDS, END = "steps.jsonl", "about.json", "ids.json", "end.json"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file in a run's `tracking/`, an empty one where there is none that can be read."""
    try:
        found = json.loads(read_below(path.parent.parent, f"{path.parent.name}/{path.name}"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object to a file in a run's `tracking/`, whole or not at all."""
    write_below(path.parent.parent, f"{path.parent.name}/{path.name}", json.dumps(content, indent=1) + "\n")


def shown(run: Path) -> Path:
    """Returns a run's folder as a person in the present folder may name it."""
    here = Path.cwd()
    return run.relative_to(here) if here in run.parents else run


class StepLog:
    """Appends to a run's `steps.jsonl`. Each line is one write, so that a kill leaves whole lines.

    Args:
        folder: the run's folder.
        epochs: of the history that the run goes on from; 0 for one that begins.
        updates: optimizer steps up to there.
    """

    def __init__(self, folder: Path, epochs: int = 0, updates: int = 0) -> None:
        self._path = make_folder(folder.absolute(), TRACKING) / STEPS
        lines = read_lines(self._path)
        kept = [line for line in lines if _holds(line, epochs, updates)]
        known = {line["row"] for line in kept if "row" in line}
        # Rows of a run that was not tracked before, or of the one whose checkpoint this one began from: when each of
        # them came is not known, but their order is, and that each took a step at least.
        now = time.time()
        unknown = [epoch for epoch in range(1, epochs + 1) if epoch not in known]
        before = [{"row": epoch, "updates": updates * epoch // epochs, "at": now} for epoch in unknown]
        firm = [{"firm": epochs}] if epochs and {"firm": epochs} not in kept else []
        name = f"{TRACKING}/{STEPS}"
        write_below(folder, name, "".join(map(_line, [*before, *kept, *firm])))
        self._descriptor = open_below(folder, name, os.O_WRONLY | os.O_APPEND)

    def add(self, content: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
            OSError: it could not be written.
        """
        os.write(self._descriptor, _line(content).encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def _holds(line: Mapping[str, Any], epochs: int, updates: int) -> bool:
    """Whether a line belongs to what a checkpoint holds; what came after it is computed anew."""
    epoch = line.get("row", line.get("firm"))
    if epoch is not None:
        return bool(epoch <= epochs)
    return bool(line.get("updates", 0) <= updates)


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"


class Tail:
    """Reads a file of lines that grows; each `news` returns the whole lines that have come since."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def news(self) -> list[str]:
        """Returns what has come; nothing where there is no file yet."""
        try:
            descriptor = open_below(self._path.parent, self._path.name, os.O_RDONLY)
            with os.fdopen(descriptor, "rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines; what is torn or foreign is left out."""
    return parse_lines(Tail(path).news())


def parse_lines(texts: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of JSON lines; what is torn or foreign is left out."""
    found = []
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                found.append(line)
    return found
