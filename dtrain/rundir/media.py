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
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from dtrain.files import append_line, make_folder, open_below, write_below
from dtrain.layout import MEDIA

logger = logging.getLogger(__name__)

INDEX = "index.jsonl"
KINDS = ("image", "histogram", "text", "file")
_MOST_INDEX = 64 << 20  # bytes of an index that are read; the last ones, of a longer one
_LONGEST_LINE = 1 << 20  # bytes
_LONGEST_NAME = 60
_told: set[Path] = set()  # indices that are too large: a page that is followed reads them again and again


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
        if any(not _is_kept(line, updates) for line in _lines(run)):
            write_below(run, f"{MEDIA}/{INDEX}", (line for line in _lines(run) if _is_kept(line, updates)))

    def add(self, entry: Entry, data: bytes | Iterable[bytes] | None = None, suffix: str = "") -> Entry:
        """Adds an entry, and its file before it, so that a kill leaves no entry without its file.

        Args:
            entry: without its file.
            data: the file's content, or its parts; None where it has none.
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
        descriptor = open_below(self._run, f"{MEDIA}/{INDEX}", os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            append_line(descriptor, _line(entry).encode(), self._run / MEDIA / INDEX)
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
    out. Of an index that is too large it is the end that is read, and a warning says so."""
    found: dict[tuple[str, str, int], Entry] = {}
    for line in _lines(run, _MOST_INDEX):
        entry = _parsed(line)
        if entry is not None:
            found[entry.kind, entry.name, entry.step] = entry
    return list(found.values())


def _lines(run: Path, most: int | None = None) -> Iterator[bytes]:
    """Yields the lines of a run's index, one by one, since all of them may not fit into the memory.

    Args:
        run: the run's folder.
        most: bytes at the index's end that are read; None for all.
    """
    try:
        descriptor = open_below(run, f"{MEDIA}/{INDEX}", os.O_RDONLY)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if most is not None and size > most:
            _say_left_out(run / MEDIA / INDEX, size - most)
            file.seek(size - most - 1)
            _skip_line(file)
        while line := file.readline(_LONGEST_LINE):
            if line.endswith(b"\n") or len(line) < _LONGEST_LINE:
                yield line
            else:
                _skip_line(file)


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(_LONGEST_LINE)) and not part.endswith(b"\n"):
        pass


def _is_kept(line: bytes, updates: int) -> bool:
    entry = _parsed(line)
    return entry is None or entry.step <= updates


def _say_left_out(index: Path, size: int) -> None:
    if index not in _told:
        _told.add(index)
        logger.warning(
            "%s is larger than %s bytes: what its first %s bytes list is not shown. It is all kept in the folder.",
            index,
            f"{_MOST_INDEX:,}",
            f"{size:,}",
        )


def _line(entry: Entry) -> str:
    return json.dumps({name: value for name, value in asdict(entry).items() if value not in ("", ())}) + "\n"


def _parsed(line: bytes) -> Entry | None:
    try:
        known: Any = json.loads(line.decode("utf-8", "replace"))
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
