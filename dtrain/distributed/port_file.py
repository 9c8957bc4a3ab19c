"""Ranks that srun starts on one node, without a launcher: rank 0 takes a port that is free, and publishes it by a file.

A port that all work out from the numbers of job and step may be another job's on the same node. The file says whose the
port is: one that a killed rank 0 has left behind, as of an earlier training in the same step, is not believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from dtrain.errors import WorldError
from dtrain.files import PRIVATE, read_below, write_below
from dtrain.launch.env.ports import quiet_port
from dtrain.launch.env.slurm_env import PORT_FILE
from dtrain.launch.signals.owner import Owner

_POLL_SECONDS = 0.05
_MOST_READ = 4096  # bytes
_SHOWN = 40  # characters
_LAST_PORT = 65_535


@contextlib.contextmanager
def agreed_port(rank: int, limit: timedelta) -> Iterator[None]:
    """Sets MASTER_PORT to the port that rank 0 has taken, where `PORT_FILE` says that it does.

    The file is there as long as the ranks meet within: a next training of the same step is to wait for its own.

    Args:
        rank: this one.
        limit: how long rank 0 may take to come.

    Raises:
        WorldError: rank 0 did not come in time, or the file's folder is another user's.
    """
    name = os.environ.get(PORT_FILE)
    if name is None:
        yield
        return
    path = Path(name)
    if rank != 0:
        os.environ["MASTER_PORT"] = _awaited(path, limit)
        yield
        return
    os.environ["MASTER_PORT"] = _published(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _published(path: Path) -> str:
    port = quiet_port()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _check_own(path.parent)
        entry = json.dumps({"port": port, "owner": asdict(Owner.me())})
        write_below(path.parent, path.name, entry, mode=PRIVATE)
    except OSError as error:
        raise WorldError(
            f"{path}: cannot be written ({error.strerror}), by which rank 0 would tell its port to the other ranks of "
            "this node. Set MASTER_PORT to a free port, the same for all tasks, or TMPDIR to a folder of your own."
        ) from None
    return str(port)


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
        text = read_below(path.parent, path.name, _MOST_READ).decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        raise
    except OSError as error:
        return "", f" ({error.strerror})"
    port, owner = _parsed(text)
    if port is None or owner is None:
        return "", f" (it holds {text[:_SHOWN]!r}, which names no port)"
    if owner.is_here and not owner.lives():
        return "", f" (it holds the port of {owner}, which has ended)"
    return str(port), ""


def _parsed(text: str) -> tuple[int | None, Owner | None]:
    try:
        entry = json.loads(text)
        port, owner = entry["port"], Owner.parse(json.dumps(entry["owner"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, None
    return (port if type(port) is int and 0 < port <= _LAST_PORT else None), owner


def _check_own(folder: Path) -> None:
    """Whoever else could write there could send ranks to a port of his own."""
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise WorldError(
            f"{folder} can be written by others. Remove it, or set TMPDIR to a folder of your own, the same "
            "for all tasks."
        )
