"""One owner of a run's folder: a second process that opens it is refused, and told who has it.

Two things say who the owner is. The file system's lock (flock) on `owner.lock` ends with the process that holds it, by
whatever death, so that exactly one of several starters gets it. The words in that file tell people who it is; they
also stand in where a lock says nothing: a file system that has none, or one that keeps locks to one machine. There
an owner on another machine counts as alive as long as it touches the file every few seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.launch.owner import Owner

logger = logging.getLogger(__name__)

FILE_NAME = "owner.lock"
_BEAT_SECONDS = 5.0
_STALE_SECONDS = 30.0  # an owner elsewhere that has not touched the file for so long is dead
_SETTLE_SECONDS = 0.5  # where there are no locks: the last of several starters to write wins
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_SECONDS = 0.1
_DYING_SECONDS = 2.0  # a rank whose launcher was killed outlives it for a moment, and may be started again at once


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Has a folder for as long as the block runs.

    Raises:
        UsageError: another process has it.
    """
    lock = _Lock(folder / FILE_NAME)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def living_owner(folder: Path) -> Owner | None:
    """Returns who has a folder now, without waiting for a sign of life; None where nobody is known to.

    One on another machine counts for as long as the file was touched a short while ago.
    """
    file = folder / FILE_NAME
    owner = _read(file)
    if owner is None or owner.is_here:
        return owner if owner is not None and owner.lives() else None
    try:
        return owner if time.time() - file.stat().st_mtime < _STALE_SECONDS else None
    except OSError:
        return None


def _read(file: Path) -> Owner | None:
    """Returns who a file says has its folder; None where nobody is said to, or the words are not whole yet."""
    try:
        return Owner(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class _Lock:
    """The file, opened and locked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._me = Owner.me()
        self._descriptor = -1
        self._locks = True  # whether this file system has any
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="dtrain-owner", daemon=True)

    def acquire(self) -> None:
        before, began = self._seen(), time.monotonic()
        while not self._try(before):
            # An owner that is gone may have left a process behind for a moment; its machine may not know it yet.
            patience = self._patience(before) if self._is_alive(before) else 2 * _STALE_SECONDS
            if time.monotonic() - began > patience:
                raise self._refusal(before)
            time.sleep(_POLL_SECONDS)
            before = self._seen()
        if before is not None:
            logger.warning("%s was left by %s, which has ended without a word; taken over.", self._path.parent, before)
        self._beats.start()

    def release(self) -> None:
        self._done.set()
        self._beats.join()
        if self._seen() == self._me:
            self._path.unlink(missing_ok=True)
        self._close()

    def _try(self, before: Owner | None) -> bool:
        """Tries once; with the lock, only an owner elsewhere that still shows signs of life has it all the same."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not self._flock() or not self._is_current():
            self._close()
            return False
        inside = self._seen()
        if inside != before or self._is_alive(inside):
            self._close()
            return False
        self._write()
        if not self._locks:
            time.sleep(_SETTLE_SECONDS)
            if self._seen() != self._me:
                self._close()
                return False
        _HELD.add(self)
        return True

    def _flock(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._locks = False
        return True

    def _is_current(self) -> bool:
        """Whether the opened file is still the one of this name: its last owner took it away as it left."""
        try:
            return self._path.stat().st_ino == os.fstat(self._descriptor).st_ino
        except OSError:
            return False

    def _is_alive(self, owner: Owner | None) -> bool:
        """Whether an owner is known to be alive; where only time can tell, it is waited for a sign of life."""
        if owner is None:
            return False
        if owner.is_here:
            return owner.lives()
        first, left = self._touched(), _STALE_SECONDS - self._age()
        if left > 2 * _BEAT_SECONDS:
            logger.warning("%s: waiting up to %.0f s for a sign of life of %s ...", self._path.parent, left, owner)
        until = time.monotonic() + left
        while time.monotonic() < until:
            if self._touched() != first:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    @staticmethod
    def _patience(owner: Owner | None) -> float:
        """How long an owner that lives is waited for; with one elsewhere, a sign of life was waited for already."""
        return _DYING_SECONDS if owner is not None and owner.is_here else 0.0

    def _touched(self) -> float:
        try:
            with self._path.open("rb") as file:  # which a network file system looks up anew, other than a path
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return 0.0

    def _age(self) -> float:
        """Returns how long ago the file was touched, by the clock that its times are of: the file server's."""
        probe = self._path.with_name(f".clock-{self._me.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self._touched()
        finally:
            probe.unlink()

    def _seen(self) -> Owner | None:
        return _read(self._path)

    def _write(self) -> None:
        text = json.dumps(asdict(self._me), indent=1).encode() + b"\n"
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def _refusal(self, owner: Owner | None) -> UsageError:
        who = "another process, which has just begun" if owner is None else str(owner)
        return UsageError(
            f"{self._path.parent} is in use by {who}. Wait until it has ended, or end it, or choose another run.name."
        )

    def _close(self) -> None:
        _HELD.discard(self)
        os.close(self._descriptor)
        self._descriptor = -1

    def leave_to_parent(self) -> None:
        """In a child that was forked off: it lets go of the file, so that the lock ends with its parent."""
        os.close(self._descriptor)
        self._descriptor = -1


_HELD: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_HELD):
        lock.leave_to_parent()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
