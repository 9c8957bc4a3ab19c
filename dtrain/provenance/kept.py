"""Copies of a run's sources in its folder: `code/1/`, and a further folder for each state that they were in.

A copy can be run (`recipe=runs/NAME/code/1/mine.py`), and shows what has changed where a run is to be resumed with
other code. Checkpoints have the hash of each file, by which a copy is known to be whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import MappingProxyType

from dtrain.files import make_folder, open_below, read_below
from dtrain.layout import CODE
from dtrain.provenance.code import content_hash

logger = logging.getLogger(__name__)

_MOST_BYTES = 20 << 20
_MOST_FILES = 2_000
_MOST_STATES = 20


def keep(run: Path, files: Mapping[str, bytes], places: Mapping[str, Path] = MappingProxyType({})) -> str | None:
    """Keeps sources in a run's folder; the same ones are kept once. Its owner alone may call it.

    Args:
        run: the run's folder.
        files: name -> content.
        places: name -> where a file is; what others may not read there, they may not read in the copy.

    Returns:
        the name of the copy below `CODE`; None where there is none, which a warning says.
    """
    if len(files) > _MOST_FILES or sum(map(len, files.values())) > _MOST_BYTES:
        logger.warning(
            "the code of the run (%d files, %.0f MB) is too large to copy to %s; a resume can detect that a file "
            "changed, but not where",
            *(len(files), sum(map(len, files.values())) / 1e6, run / CODE),
        )
        return None
    try:
        return _kept(run / CODE, files, places)
    except OSError as error:
        logger.warning("the code of the run could not be copied to %s: %s", run / CODE, error.strerror)
        return None


def read_kept(folder: Path, name: str, wanted: str) -> bytes | None:
    """Returns a file of a copy; None where it is not there, or not as it was written.

    Args:
        folder: the copy.
        name: of the file.
        wanted: the hash of its content.
    """
    try:
        content = read_below(folder.parent, PurePath(folder.name, name), _MOST_BYTES)
    except OSError:
        return None
    return content if content_hash(content) == wanted else None


def newest(run: Path) -> Path | None:
    """Returns the newest copy in a run's folder; None where there is none."""
    states = _states(run / CODE)
    return run / CODE / str(states[-1]) if states else None


def holds_copies_alone(folder: Path) -> bool:
    """Whether a folder is that of a run's copies, with nothing else in it."""
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir(folder)]
        return folder.name == CODE and all(name.strip(".").removesuffix(".part").isdecimal() for name in names)
    return False


def _kept(folder: Path, files: Mapping[str, bytes], places: Mapping[str, Path]) -> str:
    make_folder(folder.parent, folder.name)
    states = _states(folder)
    if states:
        make_folder(folder, str(states[-1]))  # which refuses a link
    if states and _fits(folder / str(states[-1]), files):
        for name, content in files.items():
            if not (folder / str(states[-1]) / name).exists():  # a module that was imported later
                _write(folder / str(states[-1]), name, content, _mode(places.get(name)))
        return str(states[-1])
    name = str(states[-1] + 1 if states else 1)
    part = folder / f".{name}.part"
    if part.is_symlink():
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for file, content in files.items():
            _write(part, file, content, _mode(places.get(file)))
        part.rename(folder / name)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in states[: 1 - _MOST_STATES]:
        shutil.rmtree(folder / str(old), ignore_errors=True)
    return name


def _states(folder: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return sorted(int(entry.name) for entry in os.scandir(folder) if entry.name.isdecimal())
    return []


def _fits(copy: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a copy has none of these files with another content; it may have more, which were imported later."""
    there = (name for name in files if os.path.lexists(copy / name))
    return all(read_kept(copy, name, content_hash(files[name])) is not None for name in there)


def _mode(place: Path | None) -> int:
    """The mode of a copy, before the umask; that of a file which has gone is not known."""
    try:
        return 0o600 if place is None else place.stat().st_mode & 0o666 | 0o600
    except OSError:
        return 0o600


def _write(copy: Path, name: str, content: bytes, mode: int) -> None:
    path = PurePath(copy.name, name)
    make_folder(copy.parent, str(path.parent))
    descriptor = open_below(copy.parent, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
