"""What the server shows: the runs as they are, read anew only where their files have changed.

All clients share one look at the files, and the next look waits ten times as long as the last one took. A look costs a
few stat calls for each run: a run's JSON is kept, and made again when one of its files has another time, size or inode.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.layout import CONFIG, FAILURE, JOB, MEDIA, OWNER, SLURM, STARTS
from dtrain.report.data import page_data, run_data
from dtrain.report.finding import RunLocation
from dtrain.report.listing import Listing, Stamp, stamp
from dtrain.report.media import MOST_OF_PAGE, size_of_media
from dtrain.report.render import embedded, render
from dtrain.report.runs import read_run
from dtrain.rundir.claims import CLAIMS, living_owner
from dtrain.rundir.media import INDEX

_READ = (CONFIG, STARTS, f"{SLURM}/{JOB}", f"{MEDIA}/{INDEX}")
_FAILURES = FAILURE.partition(".")[0]
_REST, _LONGEST_REST = 10, 2.0  # times as long as a look took, before the next one; seconds
_CHEAP = 0.005  # seconds; a look that takes no longer is made for each question
_NO_RUNS = '"runs":[]'


@dataclass(frozen=True)
class _Entry:
    """One run, as it was read last.

    Attributes:
        mark: another one whenever a file of the run has changed, or its owner.
        version: of the site, when the page last got to show something new of this run.
        name: the run's name, as JSON.
        body: what the page shows of it, as JSON that may stand in HTML.
        images: bytes of that which are images.
    """

    mark: tuple[Any, ...]
    version: int
    name: bytes
    body: bytes
    images: int


@dataclass(frozen=True)
class _Shown:
    """All runs at one moment.

    Attributes:
        version: a larger one whenever anything has changed.
        entries: the runs in their order.
    """

    version: int
    entries: tuple[_Entry, ...]


class Site:
    """What is served; safe in many threads.

    Args:
        names: as for `find_runs`; none for all that there are, those included that come later.
        runs: the folder of the runs.

    Raises:
        UsageError: there is nothing of a name.
    """

    def __init__(self, names: Sequence[str], runs: Path) -> None:
        self._listing = Listing(names, runs)
        self._instance = secrets.token_hex(8)  # a tag of another server says nothing here
        self._known: dict[RunLocation, _Entry] = {}
        self._shown: _Shown | None = None
        self._turn = threading.Lock()
        self._next = 0.0

    def look(self) -> None:
        """Looks at the files, where it is time to."""
        # While another thread looks, what was seen before will do.
        if self._turn.acquire(blocking=self._shown is None):
            try:
                began = time.monotonic()
                if began >= self._next:
                    self._read()
                    took = time.monotonic() - began
                    rest = min(_REST * took, _LONGEST_REST) if took > _CHEAP else 0.0
                    self._next = began + took + rest
            finally:
                self._turn.release()

    def data(self, since: str = "", known: str = "") -> tuple[list[bytes] | None, str]:
        """Returns the runs as JSON, in parts, and a tag that is another one whenever that is.

        Args:
            since: the tag of an earlier answer; of a run that has not changed since there is the name alone.
            known: the tag of an answer that is at hand; where nothing has changed since, there is no other: None.
        """
        shown = self._now()
        tag = self._tag(shown)
        if tag == known:
            return None, tag
        instance, _, number = since.partition("-")
        before = int(number) if instance == self._instance and number.isdecimal() else -1
        parts = [entry.body if entry.version > before else entry.name for entry in shown.entries]
        head, tail = self._around(shown)
        return [head, *_listed(parts), tail], tag

    def page(self) -> list[bytes]:
        """Returns the page, with the runs in it, in parts."""
        shown = self._now()
        empty = page_data([], live=True) | {"tag": self._tag(shown)}
        before, _, after = render(empty, live=True).partition(embedded(empty))
        head, tail = self._around(shown)
        return [before.encode(), head, *_listed([entry.body for entry in shown.entries]), tail, after.encode()]

    def _now(self) -> _Shown:
        self.look()
        return self._shown or _Shown(0, ())

    def _tag(self, shown: _Shown) -> str:
        return f"{self._instance}-{shown.version}"

    def _around(self, shown: _Shown) -> tuple[bytes, bytes]:
        """What stands before and after the runs."""
        head, tail = embedded(page_data([], live=True) | {"tag": self._tag(shown)}).split(_NO_RUNS)
        return head.encode() + _NO_RUNS[:-1].encode(), b"]" + tail.encode()

    def _read(self) -> None:
        before = self._shown or _Shown(0, ())
        version = before.version + 1
        known: dict[RunLocation, _Entry] = {}
        for place in self._listing.places():
            mark, entry = self._mark(place), self._known.get(place)
            if entry is None or entry.mark != mark:
                shown = run_data(read_run(place), MOST_OF_PAGE - sum(one.images for one in known.values()))
                body = embedded(shown).encode()
                same = entry is not None and entry.body == body
                number = entry.version if entry is not None and same else version
                entry = _Entry(mark, number, embedded(place.name).encode(), body, size_of_media(shown["media"]))
            known[place] = entry
        entries = tuple(known.values())
        changed = [e.name for e in entries] != [e.name for e in before.entries] or any(
            entry.version == version for entry in entries
        )
        self._known = known
        self._shown = _Shown(version if changed or self._shown is None else before.version, entries)

    def _mark(self, place: RunLocation) -> tuple[Any, ...]:
        """Returns what is another one whenever a run's files have changed, or its owner."""
        folder, names = str(place.folder), self._listing.names(place.folder)
        owned = any(name == OWNER or name.startswith(CLAIMS) for name in names)
        owner = str(living_owner(place.folder)) if owned else ""
        failures = sorted(name for name in names if name.startswith(_FAILURES))
        read = [name for name in _READ if name.partition("/")[0] in names]
        stamps: list[tuple[str, Stamp]] = [(name, stamp(f"{folder}/{name}")) for name in (*read, *failures)]
        return owner, self._listing.history(place), tuple(stamps)


def _listed(parts: Iterable[bytes]) -> list[bytes]:
    """Puts commas between the items of a JSON list."""
    found = [piece for part in parts for piece in (b",", part)]
    return found[1:]
