"""The folder where a launcher's ranks leave their reports, and those that launchers left which were killed.

SIGKILL leaves nobody to remove the folder, so that the next launcher on this machine does. A folder says whose it is:
one that does not, one of another user, of another machine or container, or of a process that lives, is left alone.
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

from dtrain.launch.owner import Owner

_PREFIX = "dtrain-"
_OWNER = "owner.json"


@contextlib.contextmanager
def reports_folder() -> Iterator[str]:
    """Has an empty folder, of this process, for as long as the block runs."""
    remove_left(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:  # its mode is 0700
        with contextlib.suppress(OSError):  # a full disk: then nobody removes it
            (Path(name) / _OWNER).write_text(json.dumps(asdict(Owner.me())), encoding="utf-8")
        yield name


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
        owner = Owner(**json.loads((path / _OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
    return owner.is_here and owner.started > 0 and not owner.lives()
