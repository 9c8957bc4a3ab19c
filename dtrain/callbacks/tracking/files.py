"""What a tracked run has in its folder, `tracking/`: values and facts that outlive any kill, the trackers' run ids.

::

    steps.jsonl   a JSON object a line:
                  {"updates": 265, "at": ..., "values": {"step/loss": 0.5}}: values of that moment, about one a second;
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
from typing import Any, BinaryIO, Literal

from dtrain.files import append_line, make_folder, open_below, read_below, write_below
from dtrain.layout import TRACKING
from dtrain.rundir.columns import EPOCH

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
    """Appends to a run's `steps.jsonl`. Each line is one write, so that a kill leaves whole lines; what a full disk has
    cut takes no other line with it.

    Args:
        folder: the run's folder.
        epochs: of the history that the run goes on from; 0 for one that begins.
        updates: optimizer steps up to there.
    """

    def __init__(self, folder: Path, epochs: int = 0, updates: int = 0) -> None:
        self._path = make_folder(folder.absolute(), TRACKING) / STEPS
        lines = read_lines(self._path)
        kept = [line for line in lines if _holds(line, epochs, updates)]
        known = {mark_of(line, "row") for line in kept}
        # Rows of a run that was not tracked before, or of the one whose checkpoint this one began from: when each of
        # them came is not known, but their order is, and that each took a step at least.
        now = time.time()
        unknown = [epoch for epoch in range(1, epochs + 1) if epoch not in known]
        before = [{"row": epoch, "updates": updates * epoch // epochs, "at": now} for epoch in unknown]
        firm = [{"firm": epochs}] if epochs and {"firm": epochs} not in kept else []
        name = f"{TRACKING}/{STEPS}"
        write_below(folder, name, "".join(map(_line, [*before, *kept, *firm])))
        self._descriptor = open_below(folder, name, os.O_RDWR | os.O_APPEND)

    def add(self, content: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
            OSError: it could not be written.
        """
        append_line(self._descriptor, _line(content).encode(), self._path)

    def close(self) -> None:
        """Closes the file.

        Raises:
            OSError: a file system that writes late could not write it.
        """
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def _holds(line: Mapping[str, Any], epochs: int, updates: int) -> bool:
    """Whether a line belongs to what a checkpoint holds; what came after it is computed anew."""
    for name in ("row", "firm"):
        epoch = mark_of(line, name)
        if epoch is not None:
            return epoch <= epochs
    return bool(line.get("updates", 0) <= updates)


def mark_of(line: Mapping[str, Any], name: Literal["row", "firm"]) -> int | None:
    """Returns the epoch that a line of `steps.jsonl` tells of in that way; None where it tells of something else.

    Lines of earlier versions hold values beside what is the line's own: there a user's "row" is no count, but a float.
    """
    found = line.get(name)
    return found if type(found) is int else None


def values_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a moment's line; of a line of earlier versions, all but when they came."""
    found = line.get("values")
    values = found if isinstance(found, dict) else {k: v for k, v in line.items() if k not in ("updates", "at")}
    # No moment has an epoch: trackers take what has one for a row. In lines of earlier versions it is a user's.
    return {name: value for name, value in values.items() if value is not None and name != EPOCH}


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"


class Tail:
    """Reads a file of lines that grows; each `news` returns the whole lines that have come since.

    Args:
        path: the file.
        is_rewritten: whether it may be written anew meanwhile: where it is another file, has shrunk, or has another
            first line, all of it has come since.

    Attributes:
        from_start: whether what the last `news` returned begins with the file's first line.
    """

    def __init__(self, path: Path, *, is_rewritten: bool = False) -> None:
        self.from_start = True
        self._path, self._is_rewritten = path, is_rewritten
        self._read = 0
        self._head = b""
        self._number = -1  # of the file

    def news(self) -> list[str]:
        """Returns what has come; nothing where there is no file yet."""
        try:
            descriptor = open_below(self._path.parent, self._path.name, os.O_RDONLY)
            with os.fdopen(descriptor, "rb") as file:
                if self._is_rewritten and self._is_another(file):
                    self._read, self._head = 0, b""
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.from_start = self._read == 0
        if self.from_start:
            self._head = whole[: whole.find(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()

    def _is_another(self, file: BinaryIO) -> bool:
        found = os.fstat(file.fileno())
        before, self._number = self._number, found.st_ino
        return found.st_ino != before or found.st_size < self._read or file.read(len(self._head)) != self._head


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
