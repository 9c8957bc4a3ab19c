"""One checkpoint: a folder that is whole and sealed, or not there at all.

It is written under a name that begins with a dot, each file and the folder are synced, then all is read again and
compared; only then it gets its name, and only after that older ones go. A kill at any point leaves the older ones as
they are, and a folder with a dot that the run's next start removes. A full disk gets its room back.

`manifest.json` has the size and hash of each file, and a seal over itself: whatever byte is changed is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")
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


def name_of(epoch: int, step: int | None) -> str:
    """Returns a checkpoint's name: of an epoch's end, or within one."""
    return f"epoch-{epoch}" if step is None else f"epoch-{epoch}-step-{step}"


def write_checkpoint(folder: Path, name: str, files: Mapping[str, Pieces], facts: Mapping[str, Any]) -> Path:
    """Writes a checkpoint, reads it again and gives it its name.

    Args:
        folder: of all checkpoints; it is made where it is missing.
        name: what `name_of` returns.
        files: name -> its bytes, in pieces.
        facts: what the manifest shall hold besides; JSON.

    Returns:
        the new folder.

    Raises:
        CheckpointError: there is one of this name, or what was read is not what was written.
        OSError: the disk is full, say; what was written is removed.
    """
    final, part = folder / name, folder / f".{name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise CheckpointError(f"{final} is there already and is kept as it is.")
    remove(part)
    part.mkdir()
    try:
        written = {file: _write(part / file, pieces) for file, pieces in files.items()}
        _write(part / MANIFEST, [_sealed({**facts, "files": written})])
        _sync(part)
        verify(part)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(folder)
    return final


def _write(path: Path, pieces: Pieces) -> dict[str, Any]:
    """Writes and syncs a file; returns its size and hash."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
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
        text = file.read_bytes().decode()
        facts = json.loads(text)
        seal = facts["seal"]
        blank = text.replace(f'"seal": "{seal}"', f'"seal": "{_NO_SEAL}"')
        whole = seal == _seal(blank) and isinstance(facts["files"], dict)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file} is damaged: it is not as it was written")
    return facts  # type: ignore[no-any-return]


def verify(path: Path) -> dict[str, Any]:
    """Compares a checkpoint's files with its manifest, byte by byte, and returns the manifest.

    Raises:
        CheckpointError: a file is missing or not as it was written; it is named.
    """
    facts = read_manifest(path)
    for name, expected in facts["files"].items():
        verify_file(path / name, expected)
    return facts


def verify_file(file: Path, expected: Mapping[str, Any]) -> None:
    """Compares one file with what the manifest says of it.

    Raises:
        CheckpointError: it is missing or not as it was written.
    """
    digest, size = hashlib.blake2b(digest_size=32), 0
    try:
        with file.open("rb", buffering=0) as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    if size != expected["bytes"]:
        raise CheckpointError(f"{file} is damaged: it has {size} bytes and was written with {expected['bytes']}")
    if digest.hexdigest() != expected["blake2b"]:
        raise CheckpointError(f"{file} is damaged: it is not as it was written")


def named(folder: Path) -> dict[Path, tuple[int, int | None]]:
    """Returns all that have a checkpoint's name, whole or not, with epoch and step, in their order in the run."""
    found: dict[Path, tuple[int, int | None]] = {}
    for path in folder.glob("epoch-*"):
        place = place_of(path.name)
        if place is not None and path.is_dir():
            found[path] = place
    return dict(sorted(found.items(), key=lambda item: _order(item[1])))


def place_of(name: str) -> tuple[int, int | None] | None:
    """Returns epoch and step of a checkpoint's name, None where it is no such name; see `name_of`."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), None if match[2] is None else int(match[2]))


def _order(place: tuple[int, int | None]) -> tuple[int, float]:
    return place[0], float("inf") if place[1] is None else place[1]


def all_saved(folder: Path) -> list[Saved]:
    """Returns the checkpoints whose manifest is as it was written, in their order in the run."""
    found = []
    for path, (epoch, step) in named(folder).items():
        try:
            found.append(Saved(path, epoch, step, read_manifest(path)))
        except CheckpointError:
            continue  # whoever wants to load it is told
    return found


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is in nobody's way and can still be looked at."""
    for number in range(1, 1000):
        aside = path.with_name(f".{path.name}.damaged-{number}")
        if not aside.exists():
            path.rename(aside)
            _sync(path.parent)
            return aside
    raise CheckpointError(f"{path.parent} holds a thousand damaged checkpoints: remove them")


def remove(path: Path) -> None:
    """Removes a checkpoint; a kill in the midst of it leaves nothing that looks like one."""
    if not path.exists():
        return
    gone = path if path.name.startswith(".") else path.with_name(f".{path.name}.gone")
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
