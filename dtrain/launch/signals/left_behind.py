"""Temporary folders of a process that starts ranks, and those that such processes left which were killed.

A process that is killed by SIGKILL cannot remove them: its reaper does, which outlives it, or, where that was killed
too, the next launcher on this machine. A folder says whose it is: one that does not, one of another user, of another
machine or container, or of a process that lives, is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dtrain.files import read_below
from dtrain.launch.signals.owner import Owner

_PREFIX = "dtrain-"
_OWNER = "owner.json"


_open: list[str] = []


@contextlib.contextmanager
def own_folder(purpose: str = "") -> Iterator[str]:
    """Has an empty folder, of this process, for as long as the block runs.

    Args:
        purpose: a part of its name.
    """
    remove_left(Path(tempfile.gettempdir()))
    # Not TemporaryDirectory, which removes it at the exit of a process that was forked off meanwhile, too.
    name = tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}")  # its mode is 0700
    _open.append(name)
    try:
        with contextlib.suppress(OSError):  # a full disk: then nobody but the reaper removes it
            (Path(name) / _OWNER).write_text(json.dumps(asdict(Owner.me())), encoding="utf-8")
        yield name
    finally:
        _open.remove(name)
        shutil.rmtree(name, ignore_errors=True)


def open_folders() -> list[str]:
    """Returns the folders that this process has now, of which none must outlive it."""
    return list(_open)


def remove_left(folder: Path) -> None:
    """Removes the folders in this one whose launchers have ended without doing so."""
    with contextlib.suppress(OSError):  # whatever cannot be looked at stays
        for path in folder.glob(f"{_PREFIX}*"):
            if _is_left(path):
                shutil.rmtree(path, ignore_errors=True)  # another launcher may be at it, too


def _is_left(path: Path) -> bool:
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        owner = Owner.parse(read_below(path, _OWNER))
    except OSError:
        return False
    return owner is not None and owner.is_here and owner.started > 0 and not owner.lives()
