"""Files that a person asked for: whole or not at all, and nothing lost that was not named."""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.errors import UsageError


def check_target(out: Path | None, default: Path) -> Path:
    """Returns the file to write, before any work is done for it.

    Args:
        out: as a person named it; what is there is then replaced. None for the default, which is not.
        default: the file where nobody named one.

    Raises:
        UsageError: it cannot be written there, or the default is there already.
    """
    path = default if out is None else out.expanduser()
    if out is None and path.exists():
        raise UsageError(f"{path} is there already and is kept as it is. Name it with -o {path} to replace it.")
    if path.is_dir():
        raise UsageError(f"-o {path}: is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}. Make it first, or name another one.")
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"-o {path}: cannot be written: {error.strerror}.") from None
