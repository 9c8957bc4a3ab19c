"""What the page shows of a run's `media/`: as much as one file can hold."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from dtrain.files import read_below
from dtrain.layout import MEDIA
from dtrain.rundir.media import Entry, read_media

_MOST_SERIES, _MOST_MOMENTS = 40, 12
_MOST_IMAGE, _MOST_IMAGES = 1 << 20, 4 << 20  # bytes of one, and of all of a run
MOST_OF_PAGE = 32 << 20  # of all runs, as they stand in the page
_LONGEST_TEXT = 4000  # characters
_PNG = b"\x89PNG\r\n\x1a\n"


def media_data(folder: Path, room: int = MOST_OF_PAGE) -> list[dict[str, Any]]:
    """Returns a run's series, each of one kind and name, with some of its moments; the last one is always among them.

    Args:
        folder: the run's.
        room: bytes that are left in the page.
    """
    series: dict[tuple[str, str], list[Entry]] = {}
    for entry in read_media(folder):
        series.setdefault((entry.kind, entry.name), []).append(entry)
    room = max(0, min(_MOST_IMAGES, room * 3 // 4))  # base64 takes four bytes for three
    found = []
    for (kind, name), entries in list(series.items())[:_MOST_SERIES]:
        moments = []
        for entry in reversed(_thinned(entries)):  # the last ones first, as long as there is room
            shown, room = _shown(folder, entry, room)
            moments.append({"epoch": entry.epoch, "step": entry.step, **shown})
        found.append({"kind": kind, "name": name, "all": len(entries), "moments": moments[::-1]})
    return found


def size_of_media(found: Sequence[Mapping[str, Any]]) -> int:
    """Returns the bytes that the images among what `media_data` returned take in the page."""
    return sum(len(moment.get("image", "")) for series in found for moment in series["moments"])


def _thinned(entries: Sequence[Entry]) -> list[Entry]:
    """Returns at most so many, at even distances, with the first and the last."""
    last, most = len(entries) - 1, _MOST_MOMENTS - 1
    if last <= most:
        return list(entries)
    return [entries[round(number * last / most)] for number in range(_MOST_MOMENTS)]


def _shown(folder: Path, entry: Entry, room: int) -> tuple[dict[str, Any], int]:
    """Returns what is shown of an entry, and the bytes that are left for images."""
    path = str(PurePath(MEDIA, entry.file))
    if entry.kind == "histogram":
        return _histogram(entry), room
    if entry.kind == "file":
        return {"file": path}, room
    try:
        data = read_below(folder, path, _MOST_IMAGE)
    except OSError as error:
        return {"missing": error.strerror or "cannot be read", "file": path}, room
    if entry.kind == "text":
        text = data.decode("utf-8", "replace")
        return {"text": text[:_LONGEST_TEXT] + "..." * (len(text) > _LONGEST_TEXT)}, room
    if not data.startswith(_PNG) or len(data) > room:
        why = "too large for this page" if len(data) > room else "not a PNG image"
        return {"missing": why, "file": path}, room
    return {"image": base64.b64encode(data).decode()}, room - len(data)


def _histogram(entry: Entry) -> dict[str, Any]:
    finite = all(math.isfinite(number) for number in (*entry.edges, *entry.counts))
    if not finite or len(entry.edges) != len(entry.counts) + 1 or not entry.counts:
        return {"missing": "damaged"}
    return {"counts": list(entry.counts), "edges": list(entry.edges)}
