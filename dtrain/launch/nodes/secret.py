"""The secret of a job of several nodes: where it comes from, and the keys that are made from it.

Launchers prove to each other that they know it (`dtrain.launch.nodes.handshake`); ranks authenticate what they
write into rank 0's store (`dtrain.distributed.rendezvous`). It is never sent, shown or handed on to the ranks, which
get a key made from it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.launch.env.slurm_env import NONCE

SECRET = "DTRAIN_RDZV_SECRET"  # noqa: S105 - a variable's name
SECRET_FILE = "DTRAIN_RDZV_SECRET_FILE"  # noqa: S105
KEY = "DTRAIN_JOB_KEY"  # for ranks, from their launcher
OPTION = "--rdzv-secret-file"
_LONGEST = 4096
_SHORTEST = 16  # characters: shorter ones can be guessed from a recorded handshake
_MAKE = "(umask 077; openssl rand -hex 32 > FILE)"


@dataclass(frozen=True)
class Secret:
    """A job's secret.

    Attributes:
        value: its bytes; none where the job has no secret.
        source: where it came from, in words.
    """

    value: bytes = field(default=b"", repr=False)
    source: str = ""

    def __bool__(self) -> bool:
        return bool(self.value)

    @property
    def is_short(self) -> bool:
        """Whether it is too short to resist guessing."""
        return 0 < len(self.value) < _SHORTEST

    def key(self, *purpose: str) -> bytes:
        """Returns a key of 32 bytes for a purpose; of no secret, one that everybody can make."""
        return derive(self.value, "dtrain", *purpose)


def derive(key: bytes, *words: str) -> bytes:
    """Returns HMAC-SHA256 of words, each with its length, so that no two lists of words are one text."""
    text = b"".join(b"%d:%s," % (len(raw), raw) for raw in (word.encode("utf-8", "surrogatepass") for word in words))
    return hmac.digest(key, text, hashlib.sha256)


def new_secret() -> str:
    """Returns a random secret, as text."""
    return secrets.token_hex(32)


def read_secret(file: Path | None = None, environ: MutableMapping[str, str] | None = None) -> Secret:
    """Returns the job's secret, from a file that was named or else the environment; an empty one where there is none.

    Args:
        file: what --rdzv-secret-file names.
        environ: where DTRAIN_RDZV_SECRET and DTRAIN_RDZV_SECRET_FILE are looked for.

    Raises:
        UsageError: the file cannot be read, holds nothing, or others may read it.
    """
    env = os.environ if environ is None else environ
    if file is not None:
        return _from_file(file, f"{OPTION} {file}")
    if env.get(SECRET, "").strip():
        return Secret(env[SECRET].strip().encode("utf-8", "surrogateescape"), SECRET)
    if env.get(SECRET_FILE):
        return _from_file(Path(env[SECRET_FILE]), f"{SECRET_FILE}={env[SECRET_FILE]}")
    return Secret()


def _from_file(path: Path, source: str) -> Secret:
    try:
        # A FIFO would block; what is opened is then looked at, so that nobody can put another file there in between.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"{source}: cannot be read: {(error.strerror or str(error)).lower()}. "
            "Create it, on each node or in a shared "
            f"folder: {_MAKE}"
        ) from None
    try:
        _check(os.fstat(opened), source, path)
        value = os.read(opened, _LONGEST + 1).strip()
    finally:
        os.close(opened)
    if not value or len(value) > _LONGEST:
        size = "holds nothing" if not value else f"is longer than {_LONGEST} bytes"
        raise UsageError(f"{source}: {size}. Create a new secret: {_MAKE}")
    return Secret(value, source)


def _check(about: os.stat_result, source: str, path: Path) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(f"{source}: is not a regular file. Use a file that contains the secret.")
    if about.st_uid not in (os.geteuid(), 0):
        raise UsageError(
            f"{source}: belongs to user {about.st_uid}, who can read and change it. Use a file of your own."
        )
    if about.st_mode & 0o077:
        raise UsageError(
            f"{source}: has mode {stat.S_IMODE(about.st_mode):04o}, so other users can read or change it. Create "
            f"a new secret, or, if nobody has read it: chmod 600 {path}"
        )


def without_secrets(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Returns variables without the secret, for processes that need a key at most."""
    return {name: value for name, value in environ.items() if name not in (SECRET, SECRET_FILE, KEY)}


@dataclass(frozen=True)
class RanksKey:
    """The key by which a job's ranks know each other.

    Attributes:
        value: 32 bytes.
        private: whether nobody else can make it.
    """

    value: bytes = field(repr=False)
    private: bool


_taken: list[RanksKey] = []  # so that it is found again once it has left the environment


def take_ranks_key() -> RanksKey:
    """Returns the key of this job's ranks, and takes it and the secret out of the environment.

    From the launcher, or made from the secret where ranks were started without one; where there is no secret either,
    a key that everybody can make, the same for all jobs, so that ranks of two jobs find out that they are.

    Raises:
        UsageError: there is a file for the secret, and it cannot be used.
    """
    handed = os.environ.get(KEY, "")
    if re.fullmatch("[0-9a-f]{64}", handed):
        _taken[:] = [RanksKey(bytes.fromhex(handed), private=True)]
    elif not _taken:
        secret = read_secret()
        _taken[:] = [RanksKey(ranks_key(secret, os.environ.get(NONCE, "") if secret else ""), private=bool(secret))]
    for name in (KEY, SECRET, SECRET_FILE):
        os.environ.pop(name, None)
    return _taken[0]


def ranks_key(secret: Secret, nonce: str) -> bytes:
    """Returns the key of a job's ranks."""
    return secret.key("ranks", nonce)


def warning_without(place: str) -> str:
    """Returns what a person should know of several nodes that meet without a secret."""
    return (
        f"dtrain: warning: the nodes meet at {place} without a secret: anyone who can reach this port can "
        "impersonate a node and send wrong numbers. Use one secret on all nodes: "
        f"{OPTION} FILE, created by {_MAKE}; or {SECRET}."
    )


def warning_short(secret: Secret) -> str:
    """Returns what a person should know of a secret that can be guessed."""
    return (
        f"dtrain: warning: the secret from {secret.source} has fewer than {_SHORTEST} characters: it can be guessed "
        f"from a recorded handshake. Create a longer one: {_MAKE}"
    )
