"""A short folder for the sockets of worker processes: the path of one has 107 bytes at most (unix(7)).

multiprocessing makes them below TMPDIR. Where that is long, a worker waits for ever for a socket that could not be
made; only the sockets go elsewhere, and whatever else is temporary stays where it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile

from dtrain.errors import WorldError

_LONGEST = 103  # bytes, on macOS; Linux has four more
_ADDED = len("/pymp-12345678/listener-12345678")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - a folder of our own is made in it, with mode 0700


def is_too_long(folder: str) -> bool:
    """Whether sockets below a folder for temporary files would have too long a path."""
    return len(os.fsencode(folder)) + _ADDED > _LONGEST


def short_folder() -> str | None:
    """Returns a folder where sockets have room, and that may be written; None where there is none."""
    places = (folder for folder in _SHORT if os.access(folder, os.W_OK | os.X_OK))
    return next(places, None)


def shorten_socket_paths() -> None:
    """Has multiprocessing make this process's sockets, and its workers', in a short folder where TMPDIR is a long one.

    Raises:
        WorldError: there is none.
    """
    folder = tempfile.gettempdir()
    if not is_too_long(folder):
        return
    from multiprocessing import process, util

    settings = process.current_process()._config  # type: ignore[attr-defined]
    if settings.get("tempdir") and not is_too_long(os.path.dirname(settings["tempdir"])):  # noqa: PTH120
        return
    short = short_folder()
    made = None
    with contextlib.suppress(OSError):
        made = None if short is None else tempfile.mkdtemp(prefix="pymp-", dir=short)
    if made is None:
        raise WorldError(
            f"the folder for temporary files, {folder}, has too long a path for the sockets of worker processes (at "
            f"most {_LONGEST - _ADDED} bytes), and none of {', '.join(_SHORT)} may be written. Set TMPDIR to a "
            "shorter one."
        )
    settings["tempdir"] = made
    util.Finalize(None, shutil.rmtree, args=(made,), kwargs={"ignore_errors": True}, exitpriority=-100)
