"""What a run's hooks have kept besides its columns, in `media/`: images, histograms, texts and files.

::

    media/index.jsonl    a JSON object a line: kind, name, epoch, step (optimizer steps since the run began), and
                         file (below media/), or the counts and edges of a histogram
    media/NAME/...       the files: step-00000120.png, say

Readable without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.files import make_folder, open_below, read_below, write_below
from dtrain.layout import MEDIA

INDEX = "index.jsonl"
KINDS = ("image", "histogram", "text", "file")
_MOST_INDEX = 64 << 20  # bytes
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Entry:
    """One thing that was kept.

    Attributes:
        kind: one of `KINDS`.
        name: what it shows, as the user calls it.
        epoch: in which it was made.
        step: optimizer steps since the run began.
        file: its file, relative to media/; empty of a histogram.
        counts: of a histogram, how many numbers fell into each bin.
        edges: of a histogram, where the bins begin, and where the last one ends.
    """

    kind: str
    name: str
    epoch: int
    step: int
    file: str = ""
    counts: tuple[int, ...] = ()
    edges: tuple[float, ...] = ()


class MediaFolder:
    """Writes a run's `media/`.

    Args:
        run: the run's folder.
        updates: optimizer steps of the run so far; what was kept after them is computed again, and goes.
    """

    def __init__(self, run: Path, updates: int = 0) -> None:
        self._run = run
        known = read_media(run)
        kept = [entry for entry in known if entry.step <= updates]
        if len(kept) != len(known):
            write_below(run, f"{MEDIA}/{INDEX}", "".join(map(_line, kept)))

    def add(self, entry: Entry, data: bytes | None = None, suffix: str = "") -> Entry:
        """Adds an entry, and its file before it, so that a kill leaves no entry without its file.

        Args:
            entry: without its file.
            data: the file's content; None where it has none.
            suffix: of the file's name, such as ".png".

        Returns:
            the entry, with its file.

        Raises:
            OSError: it could not be written.
        """
        make_folder(self._run, MEDIA)
        if data is not None:
            file = f"{folder_of(entry.name)}/step-{entry.step:08d}{suffix}"
            make_folder(self._run, f"{MEDIA}/{folder_of(entry.name)}")
            write_below(self._run, f"{MEDIA}/{file}", data)
            entry = replace(entry, file=file)
        descriptor = open_below(self._run, f"{MEDIA}/{INDEX}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, _line(entry).encode())
        finally:
            os.close(descriptor)
        return entry


def folder_of(name: str) -> str:
    """Returns the folder of a name: the name itself, where it can be one; else what is left of it, with a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:_LONGEST_NAME]
    if plain and plain == name and plain != INDEX:
        return plain
    return f"{plain or 'media'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read_media(run: Path) -> list[Entry]:
    """Returns what a run's index lists, in its order; of equal kinds, names and steps the last; what is damaged is left
    out."""
    try:
        text = read_below(run, f"{MEDIA}/{INDEX}", _MOST_INDEX).decode("utf-8", "replace")
    except OSError:
        return []
    found: dict[tuple[str, str, int], Entry] = {}
    for line in text.splitlines():
        entry = _parsed(line)
        if entry is not None:
            found[entry.kind, entry.name, entry.step] = entry
    return list(found.values())


def _line(entry: Entry) -> str:
    return json.dumps({name: value for name, value in asdict(entry).items() if value not in ("", ())}) + "\n"


def _parsed(line: str) -> Entry | None:
    try:
        known: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(known, Mapping):
        return None
    kind, name, file = known.get("kind"), known.get("name"), known.get("file", "")
    epoch, step = known.get("epoch"), known.get("step")
    if kind not in KINDS or not isinstance(name, str) or type(epoch) is not int or type(step) is not int:
        return None
    if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
        return None
    counts, edges = known.get("counts", []), known.get("edges", [])
    if not _are_numbers(counts) or not _are_numbers(edges):
        return None
    return Entry(kind, name, epoch, step, file, tuple(counts), tuple(edges))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)
