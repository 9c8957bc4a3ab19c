"""Short names for the contents of files, to be compared between nodes and shown to people."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dtrain.version import PACKAGE

_DIGITS = 12


def file_hash(path: Path) -> str:
    """Returns the first digits of a file's SHA-256, or "no such file"."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]
    except OSError:
        return "no such file"


def code_hash() -> str:
    """Returns one hash of all of dtrain's own Python files."""
    whole = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        whole.update(f"{path.relative_to(PACKAGE)}\0{file_hash(path)}\n".encode())
    return whole.hexdigest()[:_DIGITS]
