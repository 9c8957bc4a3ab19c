"""Which runs a person means by a folder, a name in the folder of runs, or a history's file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.config.saved import CONFIG
from dtrain.errors import UsageError, nearest
from dtrain.history import FILE_NAME

_MOST_NAMED = 5


@dataclass(frozen=True)
class Place:
    """Where a run is.

    Attributes:
        name: what to call it; no two of a selection have the same one.
        folder: what its files are in.
        history: its history's file, which need not be there yet.
    """

    name: str
    folder: Path
    history: Path


def find_runs(names: Sequence[str], runs: Path) -> list[Place]:
    """Returns the runs that are meant, each once, in this order.

    Args:
        names: each a run's folder, its name in `runs`, a history's file, or a folder of runs; none for all of `runs`,
            where those that changed last come first.
        runs: the folder of the runs.

    Raises:
        UsageError: there is nothing of a name.
    """
    found = [place for name in names for place in _meant(name, runs)] if names else runs_in(runs)
    once: dict[Path, Place] = {}
    for place in found:
        once.setdefault(place.history.resolve(), place)
    return _told_apart(list(once.values()))


def runs_in(folder: Path) -> list[Place]:
    """Returns the runs that lie in a folder, those that changed last first; none where there is no such folder."""
    try:
        found = [path for path in folder.iterdir() if is_run(path)]
    except OSError:
        return []
    return [_place(path) for path in sorted(found, key=lambda path: (-changed(path), path.name))]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has a config or a history."""
    return (path / CONFIG).is_file() or (path / FILE_NAME).is_file()


def _meant(name: str, runs: Path) -> list[Place]:
    path = Path(name).expanduser()
    for candidate in (path, runs / name):
        if is_run(candidate):
            return [_place(candidate)]
    if path.is_file():
        return [_of_file(path)]
    inside = runs_in(path)
    if inside:
        return inside
    if path.is_dir():
        raise UsageError(f"{name}: is no run's folder, and has none in it: there is no {CONFIG} and no {FILE_NAME}.")
    there = [place.name for place in runs_in(runs)]
    known = f" Runs in {runs}: {', '.join(there[:_MOST_NAMED])}{', ...' * (len(there) > _MOST_NAMED)}." if there else ""
    raise UsageError(
        f"{name}: there is no such run, neither as a path nor in {runs}/.{nearest(name, there)}{known} "
        "`dtrain history` lists them; --dir names another folder of runs."
    )


def _place(folder: Path) -> Place:
    return Place(folder.name or folder.resolve().name, folder, folder / FILE_NAME)


def _of_file(file: Path) -> Place:
    """A history by its file: that of a run's folder, or one that a script keeps anywhere."""
    if file.name == FILE_NAME:
        return Place(file.resolve().parent.name, file.parent, file)
    return Place(file.stem, file.parent, file)


def changed(folder: Path) -> float:
    """Returns when a run last changed, in seconds since the epoch."""
    for name in (FILE_NAME, CONFIG):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _told_apart(places: list[Place]) -> list[Place]:
    """Gives runs of one name so much of their paths that they differ."""
    names = [place.name for place in places]
    alike = {name for name in names if names.count(name) > 1}
    return [
        replace(place, name=os.path.relpath(place.folder if place.history.name == FILE_NAME else place.history))
        if place.name in alike
        else place
        for place in places
    ]
