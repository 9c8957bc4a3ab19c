"""One checkpoint: a folder that is whole and sealed, or not there at all.

It is written under a name that begins with a dot, each file and the folder are synced, then all is read again and
compared; only then it gets its name, and only after that older ones go. A kill at any point leaves the older ones as
they are, and a folder with a dot that the run's next start removes. A full disk gets its room back.

`manifest.json` has the size and hash of each file, and a seal over itself: whatever byte is changed is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from dtrain.errors import CheckpointError
from dtrain.files import folder_opened, make_folder, open_below, read_text_below
from dtrain.layout import checkpoint_name, checkpoints_in

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NO_SEAL = "0" * 64
_PIECE = 1 << 20

Pieces = Iterable["bytes | memoryview"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has its name, and what its manifest says.

    Attributes:
        path: its folder.
        epoch: the epoch that it was saved in or after.
        step: the train steps of that epoch that were done, None at the epoch's end.
        facts: what the manifest holds besides the files.
    """

    path: Path
    epoch: int
    step: int | None
    facts: dict[str, Any]

    @property
    def row(self) -> dict[str, Any] | None:
        """The history's row of the epoch at whose end it was saved; None within an epoch."""
        row: dict[str, Any] | None = self.facts.get("row")
        return row


def write_checkpoint(folder: Path, name: str, files: Mapping[str, Pieces], facts: Mapping[str, Any]) -> Path:
    """Writes a checkpoint, reads it again and gives it its name.

    Args:
        folder: of all checkpoints; it is made where it is missing.
        name: what `checkpoint_name` returns.
        files: name -> its bytes, in pieces.
        facts: what the manifest shall hold besides; JSON.

    Returns:
        the new folder.

    Raises:
        CheckpointError: there is one of this name, or what was read is not what was written.
        OSError: the disk is full, say; what was written is removed.
    """
    final, part = folder / name, folder / f".{name}.part"
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_folder(folder.parent, folder.name)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} already exists and is not overwritten.")
    remove(part)
    with folder_opened(folder.parent, folder.name) as parent:
        os.mkdir(part.name, dir_fd=parent)
        try:
            written = {file: _write(part, file, pieces) for file, pieces in files.items()}
            _write(part, MANIFEST, [_sealed({**facts, "files": written})])
            _sync(part)
            verify(part)
            os.rename(part.name, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    _sync(folder)
    return final


def _write(folder: Path, name: str, pieces: Pieces) -> dict[str, Any]:
    """Writes and syncs a file of a checkpoint; returns its size and hash."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    # From the run's folder on, no link is followed.
    below = f"{folder.parent.name}/{folder.name}/{name}"
    descriptor = open_below(folder.parent.parent, below, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _sealed(facts: dict[str, Any]) -> bytes:
    text = json.dumps({**facts, "seal": _NO_SEAL}, indent=1)
    return text.replace(f'"seal": "{_NO_SEAL}"', f'"seal": "{_seal(text)}"').encode()


def _seal(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest and checks its seal.

    Raises:
        CheckpointError: it cannot be read or is not as it was written.
    """
    file = path / MANIFEST
    try:
        text = read_text_below(path.parent, f"{path.name}/{MANIFEST}")
        facts = json.loads(text)
        seal = facts["seal"]
        blank = text.replace(f'"seal": "{seal}"', f'"seal": "{_NO_SEAL}"')
        whole = seal == _seal(blank) and isinstance(facts["files"], dict)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file} is damaged: its content has changed since it was written")
    return facts  # type: ignore[no-any-return]


def verify(path: Path) -> dict[str, Any]:
    """Compares a checkpoint's files with its manifest, byte by byte, and returns the manifest.

    Raises:
        CheckpointError: a file is missing or not as it was written; it is named.
    """
    facts = read_manifest(path)
    for name, expected in facts["files"].items():
        if PurePath(name).name != name:
            raise CheckpointError(f"{path / MANIFEST} lists a file outside of the checkpoint: {name!r}")
        verify_file(path / name, expected)
    return facts


def check_place(path: Path, facts: Mapping[str, Any]) -> None:
    """Compares a checkpoint's name with what was saved there.

    Raises:
        CheckpointError: it was saved under another name, and copied or renamed since.
    """
    row = facts.get("row") or {}
    epoch, step = facts.get("epoch", row.get("epoch")), facts.get("step")
    if epoch is not None and path.name != checkpoint_name(epoch, step):
        raise CheckpointError(
            f"{path} contains the checkpoint {checkpoint_name(epoch, step)}: it was copied or renamed. Rename it back "
            "to use it"
        )


def verify_file(file: Path, expected: Mapping[str, Any]) -> None:
    """Compares one file with what the manifest says of it.

    Raises:
        CheckpointError: it is missing or not as it was written.
    """
    digest, size = hashlib.blake2b(digest_size=32), 0
    try:
        descriptor = open_below(file.parent, file.name, os.O_RDONLY)
        with os.fdopen(descriptor, "rb", buffering=0) as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    if size != expected["bytes"]:
        raise CheckpointError(f"{file} is damaged: it has {size} bytes and was written with {expected['bytes']}")
    if digest.hexdigest() != expected["blake2b"]:
        raise CheckpointError(f"{file} is damaged: its content has changed since it was written")


def all_saved(folder: Path) -> list[Saved]:
    """Returns the checkpoints whose manifest is as it was written, in their order in the run."""
    found = []
    for path, (epoch, step) in checkpoints_in(folder).items():
        try:
            facts = read_manifest(path)
            check_place(path, facts)
            found.append(Saved(path, epoch, step, facts))
        except CheckpointError:
            continue  # whoever wants to load it is told
    return found


def make_way(path: Path) -> None:
    """Puts aside what has the name that a checkpoint is to get, where it is a copy, a link or damaged."""
    if not os.path.lexists(path):
        return
    try:
        check_place(path, read_manifest(path))
    except CheckpointError as error:
        logger.warning("%s; it is now %s", error, set_aside(path).name)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is in nobody's way and can still be looked at."""
    for number in range(1, 1000):
        aside = path.with_name(f".{path.name}.damaged-{number}")
        if not os.path.lexists(aside):
            path.rename(aside)
            _sync(path.parent)
            return aside
    raise CheckpointError(f"{path.parent} contains a thousand damaged checkpoints: remove them")


def remove(path: Path) -> None:
    """Removes a checkpoint; a kill in the midst of it leaves nothing that looks like one."""
    if path.is_symlink():
        path.unlink()  # what it leads to is somebody else's
    if not path.exists():
        return
    gone = path if path.name.startswith(".") else path.with_name(f".{path.name}.gone")
    with contextlib.suppress(FileNotFoundError):  # somebody else removes it, too
        if gone != path:
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
        shutil.rmtree(gone)


def remove_leftovers(folder: Path) -> list[str]:
    """Removes what killed saves and removals left; only the run's owner may. Returns their names."""
    left = [path for path in folder.glob(".epoch-*") if path.name.endswith((".part", ".gone"))]
    for path in left:
        remove(path)
    return [path.name for path in left]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
