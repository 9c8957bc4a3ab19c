"""Who owns a run's folder, as the files there say: `owner.lock`, and the claims that follow it
(`dtrain.rundir.lock`)."""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.files import folder_opened, open_below
from dtrain.launch.signals.owner import Owner
from dtrain.layout import OWNER

CLAIMS = ".owner-"  # what the names of claims, and of files that become one, begin with
STALE_SECONDS = 30.0  # an owner elsewhere that has not touched the file for so long is dead
_MOST_READ = 1 << 16
_LONGEST_CHAIN = 100
_TOKEN = re.compile(r"[0-9a-z]{1,64}")


@dataclass(frozen=True)
class Holder:
    """Who stands at the end of the chain of claims.

    Attributes:
        file: the name of the claim.
        token: what names the claim that follows it.
        owner: None where the words are not those of an owner.
        touched: the file's time.
    """

    file: str
    token: str
    owner: Owner | None
    touched: float


def claim_after(token: str) -> str:
    """Returns the name of the claim to the place of a dead owner."""
    return f"{CLAIMS}after-{token}"


def end_of(folder: Path) -> Holder | None:
    """Reads the chain of claims of a folder, from `owner.lock` on; returns its end, None where there is none.

    Raises:
        OSError: the folder or a file of the chain cannot be read, or is something else than a file.
    """
    holder, name = None, OWNER
    for _ in range(_LONGEST_CHAIN):
        try:
            descriptor = open_below(folder, name, os.O_RDONLY)
        except FileNotFoundError:
            with folder_opened(folder):  # the folder itself is there
                return holder
        with os.fdopen(descriptor, "rb") as file:
            data, touched = file.read(_MOST_READ), os.fstat(descriptor).st_mtime
        owner = Owner.parse(data)
        token = owner.token if owner is not None and _TOKEN.fullmatch(owner.token) else _hash(data)
        holder = Holder(name, token, owner, touched)
        name = claim_after(token)
    return holder


def living_owner(folder: Path) -> Owner | None:
    """Returns who owns a folder now, without waiting for a sign of life; None where nobody is known to.

    One on another machine counts for as long as the file was touched a short while ago.
    """
    try:
        descriptor = open_below(folder, OWNER, os.O_RDONLY)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        owner, touched = Owner.parse(file.read(_MOST_READ)), os.fstat(descriptor).st_mtime
    if owner is None or owner.is_here:
        return owner if owner is not None and owner.lives() else None
    return owner if abs(time.time() - touched) < STALE_SECONDS else None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
