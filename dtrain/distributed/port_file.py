"""Ranks that srun starts on one node, without a launcher: rank 0 takes a port that is free, and publishes it by a file.

A port that all work out from the numbers of job and step may be another job's on the same node.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import stat
import time
from datetime import timedelta
from pathlib import Path

from dtrain.errors import WorldError
from dtrain.files import PRIVATE, read_below, write_below
from dtrain.launch.env.ports import quiet_port
from dtrain.launch.env.slurm_env import PORT_FILE

_POLL_SECONDS = 0.05
_MOST_READ = 32  # bytes
_LAST_PORT = 65_535


def agree_on_port(rank: int, limit: timedelta) -> None:
    """Sets MASTER_PORT to the port that rank 0 has taken, where `PORT_FILE` says that it does.

    Args:
        rank: this one.
        limit: how long rank 0 may take to come.

    Raises:
        WorldError: rank 0 did not come in time, or the file's folder is another user's.
    """
    name = os.environ.get(PORT_FILE)
    if name is None:
        return
    path = Path(name)
    if rank == 0:
        os.environ["MASTER_PORT"] = _published(path)
    else:
        os.environ["MASTER_PORT"] = _awaited(path, limit)


def _published(path: Path) -> str:
    port = str(quiet_port())
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _check_own(path.parent)
        write_below(path.parent, path.name, port, mode=PRIVATE)
    except OSError as error:
        raise WorldError(
            f"{path}: cannot be written ({error.strerror}), by which rank 0 would tell its port to the other ranks of "
            "this node. Set MASTER_PORT to a free port, the same for all tasks, or TMPDIR to a folder of your own."
        ) from None
    atexit.register(_remove, path, os.getpid())
    return port


def _awaited(path: Path, limit: timedelta) -> str:
    deadline, found = time.monotonic() + limit.total_seconds(), ""
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            _check_own(path.parent)
            port, found = _read(path)
            if port:
                return port
        time.sleep(_POLL_SECONDS)
    raise WorldError(
        f"rank 0 did not come within {limit.total_seconds():g} s: it would have left its port in {path}{found}. See "
        "why in its output; all tasks of a step need the same TMPDIR."
    )


def _read(path: Path) -> tuple[str, str]:
    """Returns the port in a file; or an empty one, and what is there instead, which rank 0 replaces.

    Raises:
        FileNotFoundError: there is nothing.
    """
    try:
        text = read_below(path.parent, path.name, _MOST_READ).decode("ascii", errors="replace").strip()
    except FileNotFoundError:
        raise
    except OSError as error:
        return "", f" ({error.strerror})"
    known = text.isdecimal() and 0 < int(text) <= _LAST_PORT
    return (text, "") if known else ("", f" (it holds {text!r}, which is no port)")


def _check_own(folder: Path) -> None:
    """Whoever else could write there could send ranks to a port of his own."""
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise WorldError(
            f"{folder} can be written by others. Remove it, or set TMPDIR to a folder of your own, the same "
            "for all tasks."
        )


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in what was forked off
        path.unlink(missing_ok=True)
