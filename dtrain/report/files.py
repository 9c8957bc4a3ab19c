"""Files that a person asked for: whole or not at all, and nothing lost that was not named."""

from __future__ import annotations

from pathlib import Path

from dtrain.errors import UsageError
from dtrain.files import written_whole


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
        raise UsageError(f"{path} already exists and is not overwritten. To replace it, use -o {path}.")
    if path.is_dir():
        raise UsageError(f"-o {path}: is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: no such folder: {path.parent}. Create it, or choose another one.")
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with written_whole(path) as file:
            file.write(data)
    except OSError as error:
        raise UsageError(f"-o {path}: cannot be written: {error.strerror}.") from None
