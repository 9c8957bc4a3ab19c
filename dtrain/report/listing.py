"""Which runs there are, asked again and again: folders are listed anew only where something has come or gone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.layout import CONFIG
from dtrain.report.finding import RunLocation, find_runs, is_run

Stamp = tuple[int, int, int]  # inode, time of the last change in ns, size; zeros where there is no such file

_NOTHING: Stamp = (0, 0, 0)
_SETTLED = 2 * 10**9  # ns: within the grain of a file system's clock, a second change may have the first one's time


def stamp(path: str) -> Stamp:
    """Returns what is another one whenever a file has been changed or replaced."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path for each of thousands of files would cost more than the call
    except (OSError, ValueError):
        return _NOTHING
    return found.st_ino, found.st_mtime_ns, found.st_size


class Listing:
    """The runs that are meant, as they come and go.

    Args:
        names: as for `find_runs`.
        runs: the folder of the runs.

    Raises:
        UsageError: there is nothing of a name.
    """

    def __init__(self, names: Sequence[str], runs: Path) -> None:
        self._names = names
        self._runs = runs
        self._places = find_runs(names, runs)
        self._listed: dict[str, tuple[Stamp, frozenset[str]]] = {}  # folders, as they were listed last
        self._shape: object = None
        self._histories: dict[RunLocation, Stamp] = {}

    def places(self) -> list[RunLocation]:
        """Returns the runs; where none is named, those whose history changed last come first."""
        self._histories = {place: self._stamp_of(place) for place in self._places}
        shape = self._shape_now()
        if shape != self._shape:
            self._shape = shape
            with contextlib.suppress(UsageError):  # one has gone since: the others are still shown
                self._places = find_runs(self._names, self._runs)
            self._histories = {place: self._stamp_of(place) for place in self._places}
            self._forget()
        if not self._names:
            self._places.sort(key=lambda place: (-self._histories[place][1], place.name))
        return self._places

    def history(self, place: RunLocation) -> Stamp:
        """Returns the stamp of a run's history, or of its config where it has none yet, as `places` saw it."""
        return self._histories[place]

    def names(self, folder: Path) -> frozenset[str]:
        """Returns the names in a folder; empty where it cannot be listed."""
        path = str(folder)
        now = stamp(path)
        known = self._listed.get(path)
        if known is not None and known[0] == now:
            return known[1]
        try:
            names = frozenset(os.listdir(path))  # noqa: PTH208 - names, not paths
        except OSError:
            names = frozenset()
        self._listed[path] = now if time.time_ns() - now[1] > _SETTLED else _NOTHING, names
        return names

    def _named(self) -> list[Path]:
        return [Path(name).expanduser() for name in self._names]

    def _stamp_of(self, place: RunLocation) -> Stamp:
        found = stamp(str(place.history))
        return stamp(f"{place.folder}/{CONFIG}") if found == _NOTHING else found

    def _shape_now(self) -> object:
        """What is another one whenever a run may have come or gone."""
        known = {str(place.folder) for place in self._places}
        roots = [self._runs, *(path for path in self._named() if path.is_dir())]
        others: set[object] = set()
        for root in roots:
            names = self.names(root)
            others.add((root, names))
            # A folder that is no run yet is one as soon as it has a config or a history.
            others |= {(path, is_run(Path(path))) for name in names if (path := f"{root}/{name}") not in known}
        return others, frozenset(place for place, seen in self._histories.items() if seen == _NOTHING)

    def _forget(self) -> None:
        """Drops what was listed of folders that are shown no more."""
        keep = {str(path) for path in (self._runs, *self._named(), *(place.folder for place in self._places))}
        self._listed = {path: found for path, found in self._listed.items() if path in keep}
