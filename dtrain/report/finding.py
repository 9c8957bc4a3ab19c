"""Which runs a person means by a folder, a name in the folder of runs, or a history's file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.errors import UsageError, nearest
from dtrain.layout import CONFIG, HISTORY

_MOST_NAMED = 5


@dataclass(frozen=True)
class RunLocation:
    """Where a run is.

    Attributes:
        name: what to call it; no two of a selection have the same one.
        folder: what its files are in.
        history: its history's file, which need not be there yet.
    """

    name: str
    folder: Path
    history: Path


def find_runs(names: Sequence[str], runs: Path) -> list[RunLocation]:
    """Returns the runs that are meant, each once, in this order.

    Args:
        names: each a run's folder, its name in `runs`, a history's file, or a folder of runs; none for all of `runs`,
            where those that changed last come first.
        runs: the folder of the runs.

    Raises:
        UsageError: there is nothing of a name.
    """
    found = [place for name in names for place in _meant(name, runs)] if names else runs_in(runs)
    once: dict[Path, RunLocation] = {}
    for place in found:
        once.setdefault(place.folder.resolve() / place.history.name, place)
    return _told_apart(list(once.values()))


def runs_in(folder: Path) -> list[RunLocation]:
    """Returns the runs that lie in a folder, those that changed last first; none where there is no such folder.

    A link that leads out of the folder is not followed: see `links_out`.
    """
    try:
        found = [path for path in folder.iterdir() if is_run(path) and _stays(path, folder)]
    except OSError:
        return []
    return [_place(path) for path in sorted(found, key=lambda path: (-changed(path), path.name))]


def links_out(folder: Path) -> list[str]:
    """Returns the names of the links in a folder that lead to runs elsewhere: they are shown where they are named."""
    try:
        return sorted(path.name for path in folder.iterdir() if is_run(path) and not _stays(path, folder))
    except OSError:
        return []


def words_on_links(folder: Path) -> list[str]:
    """Returns a line on them for a person; none where there are none."""
    names = links_out(folder)
    shown = ", ".join(names[:_MOST_NAMED]) + ", ..." * (len(names) > _MOST_NAMED)
    first = f"{folder}/{names[0]}" if names else ""
    return (
        [f"skipped, since the link points outside of {folder}: {shown}; name it to show it, as in {first}"]
        if names
        else []
    )


def _stays(path: Path, folder: Path) -> bool:
    try:
        return not path.is_symlink() or path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead to one another
        return False


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has a config or a history, in whatever state, or cannot be looked into."""
    try:
        return any(_is_there(path / name) for name in (CONFIG, HISTORY))
    except PermissionError:
        return path.is_dir()


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False
    return True


def _meant(name: str, runs: Path) -> list[RunLocation]:
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
        raise UsageError(f"{name}: is neither a run's folder nor a folder of runs: no {CONFIG} and no {HISTORY}.")
    there = [place.name for place in runs_in(runs)]
    known = f" Runs in {runs}: {', '.join(there[:_MOST_NAMED])}{', ...' * (len(there) > _MOST_NAMED)}." if there else ""
    raise UsageError(
        f"{name}: no such run, neither as a path nor in {runs}/.{nearest(name, there)}{known} "
        "List them with `dtrain history`; set another folder of runs with --dir."
    )


def _place(folder: Path) -> RunLocation:
    return RunLocation(folder.name or folder.resolve().name, folder, folder / HISTORY)


def _of_file(file: Path) -> RunLocation:
    """A history by its file: that of a run's folder, or one that a script keeps anywhere."""
    if file.is_symlink():  # a person named it
        return RunLocation(file.stem, file.resolve().parent, file.resolve())
    if file.name == HISTORY:
        return RunLocation(file.resolve().parent.name, file.parent, file)
    return RunLocation(file.stem, file.parent, file)


def changed(folder: Path) -> float:
    """Returns when a run last changed, in seconds since the epoch."""
    for name in (HISTORY, CONFIG):
        try:
            return (folder / name).lstat().st_mtime
        except OSError:
            continue
    return 0.0


def _told_apart(places: list[RunLocation]) -> list[RunLocation]:
    """Gives runs of one name so much of their paths that they differ."""
    names = [place.name for place in places]
    alike = {name for name in names if names.count(name) > 1}
    return [
        replace(place, name=os.path.relpath(place.folder if place.history.name == HISTORY else place.history))
        if place.name in alike
        else place
        for place in places
    ]
