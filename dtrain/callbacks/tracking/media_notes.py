"""Which of a run's images, histograms, texts and files a tracker has got, noted in the run's folder.

A run that was killed and resumed keeps what its hooks made up to its checkpoint, and makes the rest again, the same:
what a tracker has of it is not sent again, and what it has not got is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dtrain.files import append_line, make_folder, open_below
from dtrain.layout import MEDIA, TRACKING
from dtrain.rundir.media import INDEX, Entry, read_media

Key = tuple[str, str, int]


class MediaNotes:
    """A tracker's notes.

    Args:
        run: the run's folder.
        tracker: whose.
        upto: notes of later optimizer steps are forgotten, where the tracker has forgotten these, too; None for none.
    """

    def __init__(self, run: Path, tracker: str, upto: int | None = None) -> None:
        self._run, self._file = run, f"{TRACKING}/media-{tracker}.jsonl"
        self.are_new = not (run / self._file).exists()
        self._known = {key for key in self._read() if upto is None or key[2] <= upto}

    def __contains__(self, entry: Entry) -> bool:
        """Whether the tracker has it."""
        return key_of(entry) in self._known

    def add(self, *entries: Entry) -> None:
        """Notes what the tracker has taken; in this process alone, where the disk takes nothing."""
        self._known.update(map(key_of, entries))
        with contextlib.suppress(OSError):
            make_folder(self._run, TRACKING)
            descriptor = open_below(self._run, self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "r+b", closefd=True):
                for entry in entries:
                    append_line(descriptor, (json.dumps(key_of(entry)) + "\n").encode(), self._run / self._file)

    def _read(self) -> set[Key]:
        try:
            descriptor = open_below(self._run, self._file, os.O_RDONLY)
        except OSError:
            return set()
        with os.fdopen(descriptor, "rb") as file:
            return {key for line in file if (key := _parsed(line)) is not None}


class MediaIndex:
    """A run's media as they come, for who only sees its folder.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._seen: Any = None

    def news(self) -> list[Entry]:
        """Returns all that there is, where that is more or less than before; else nothing."""
        try:
            found = (self._run / MEDIA / INDEX).stat()
        except OSError:
            return []
        now = (found.st_size, found.st_mtime_ns, found.st_ino)
        if now == self._seen:
            return []
        self._seen = now
        return read_media(self._run)


def key_of(entry: Entry) -> Key:
    """Returns what an entry is known by."""
    return entry.kind, entry.name, entry.step


def _parsed(line: bytes) -> Key | None:
    try:
        kind, name, step = json.loads(line)
    except ValueError:  # the end of a line that a full disk has cut
        return None
    return (str(kind), str(name), step) if type(step) is int else None
