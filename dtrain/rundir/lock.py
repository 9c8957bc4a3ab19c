"""One owner of a run's folder: a second process that opens it is refused, and the message names the first.

Ownership rests on what every file system has: only one process can create a name that is not there. `owner.lock` holds
who owns the folder. It is written in full under another name first and appears by link(2), which fails where the name
is taken. A dead owner's place is claimed by creating a name that is made of the dead owner's token, which is possible
once; the claim then replaces `owner.lock`. After each claim the chain of claims is read again from `owner.lock`, and
a claim that is not at its end is withdrawn: it was made for an owner that somebody else had replaced meanwhile.

Whether an owner lives: the lock of its file (flock) is held by its process, where locks work between machines; on this
machine, its process number and start time; on another one, it touches its file every few seconds, and reads back that
it is still the owner. No clock of any machine is compared with another's: the file's time has to change.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from dtrain.errors import DtrainError, StopRequested, UsageError
from dtrain.files import MODE, folder_opened, identity_of, open_below
from dtrain.launch.signals.owner import Owner
from dtrain.layout import OWNER
from dtrain.rundir.claims import CLAIMS, STALE_SECONDS, Holder, claim_after, end_of

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0
_STALE_SECONDS = STALE_SECONDS
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
_IN_THE_WAY = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EINVAL)
_POLL_SECONDS = 0.1
_DYING_SECONDS = 2.0  # a rank whose launcher was killed outlives it for a moment, and may be started again at once


@contextlib.contextmanager
def owned(folder: Path, asked: Callable[[], str | None] = lambda: None) -> Iterator[Ownership]:
    """Owns a folder for as long as the block runs.

    Args:
        folder: it is there.
        asked: returns what asked this process to stop, such as "SIGTERM", or None; looked at while it waits.

    Raises:
        UsageError: another process owns it, or something that is no file of dtrain's is in the way.
        StopRequested: this process was asked to stop while it waited.
    """
    ownership = Ownership(folder, asked)
    ownership.acquire()
    try:
        yield ownership
    finally:
        ownership.release()


class Ownership:
    """This process's claim to a folder.

    Args:
        folder: the run's.
        asked: returns what asked this process to stop, or None.
    """

    def __init__(self, folder: Path, asked: Callable[[], str | None]) -> None:
        self._folder = folder.absolute()  # a step may change the working directory
        self._shown = folder
        self._asked = asked
        self._identity = identity_of(folder)
        self._me = Owner.me()
        self._part = f"{CLAIMS}{self._me.token}.part"
        self._descriptor = -1
        self._lost: str | None = None
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="dtrain-owner", daemon=True)

    def acquire(self) -> None:
        """Waits for an owner that may be dead, and takes its place."""
        try:
            before = self._claimed()
        except OSError as error:
            self._close()
            if error.errno not in _IN_THE_WAY:
                raise
            path = error.filename if isinstance(error.filename, str) and "/" in error.filename else self._folder
            raise UsageError(
                f"{path}: {error.strerror}, so this process cannot lock the run's folder. Remove that file, or choose "
                "another run.name."
            ) from None
        except BaseException:
            self._close()
            raise
        if before is not None and before.owner is not None:
            logger.warning(
                "%s: the lock of %s is stale, since it was killed or crashed; continuing.", self._shown, before.owner
            )
        self._beats.start()
        _HELD.add(self)

    def check(self) -> None:
        """Whether this process still owns the folder; what is written there asks first, at the cost of one stat().

        Raises:
            DtrainError: the folder was removed, moved or exchanged.
            UsageError: another process has taken it over, since this one showed no sign of life for a time.
        """
        if self._identity != identity_of(self._folder):
            raise DtrainError(
                f"{self._shown} was removed, moved or replaced during training. Nothing more is written. If it was "
                "moved, move it back and run the same command again."
            )
        if self._lost is not None:
            raise UsageError(
                f"{self._shown} was taken over by {self._lost}, since this process did not respond for "
                f"{_STALE_SECONDS:.0f} s (it was suspended, or its file system hung). Nothing more is written."
            )

    def release(self) -> None:
        """Gives the folder up."""
        self._done.set()
        self._beats.join()
        with contextlib.suppress(OSError):  # the folder may be gone
            if self._is_mine():
                self._unlink(OWNER)
        self._close()

    # --- the claim ------------------------------------------------------------------------------------

    def _claimed(self) -> Holder | None:
        """Returns the dead owner whose place was taken; None where there was none."""
        began = time.monotonic()
        while True:
            holder = end_of(self._folder)
            if holder is None:
                if self._claim(OWNER):
                    self._tidy()
                    return None
            elif self._is_alive(holder):
                if time.monotonic() - began > self._patience(holder):
                    raise self._refusal(holder)
            elif self._took_over(holder):
                return holder
            self._wait(_POLL_SECONDS)

    def _is_mine(self) -> bool:
        end = end_of(self._folder)
        return end is not None and end.owner == self._me

    def _claim(self, name: str) -> bool:
        """Creates a name that holds this process's words; returns whether that succeeded."""
        if self._descriptor < 0:
            self._prepare()
        with folder_opened(self._folder) as folder:
            try:
                os.link(self._part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:  # another owner has tidied up
                self._close()
                return False
            except FileExistsError:  # or NFS has sent the same call twice, of which the first one succeeded
                if not self._is_own_file(name, folder):
                    return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._claim_without_links(name, folder)
            os.unlink(self._part, dir_fd=folder)
        return True

    def _is_own_file(self, name: str, folder: int) -> bool:
        """Whether a name is one of the file that this process has made; that it has two names does not say which."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(name, dir_fd=folder, follow_symlinks=False))
        return False

    def _claim_without_links(self, name: str, folder: int) -> bool:
        """The same where there are no hard links: an empty file first, which others take for an owner in the making."""
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE, dir_fd=folder))
        except FileExistsError:
            return False
        os.replace(self._part, name, src_dir_fd=folder, dst_dir_fd=folder)
        return True

    def _prepare(self) -> None:
        """Writes this process's words under a name of their own, and locks that file."""
        self._descriptor = open_below(self._folder, self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = json.dumps(asdict(self._me), indent=1).encode() + b"\n"
        if os.write(self._descriptor, text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder / OWNER))
        os.fsync(self._descriptor)

    def _took_over(self, dead: Holder) -> bool:
        """Claims a dead owner's place; of several that try, one succeeds."""
        name = claim_after(dead.token)
        if not self._claim(name):
            return False
        if not self._is_mine():  # `dead` had been replaced before the claim was made
            self._close()
            self._unlink(name)
            return False
        with folder_opened(self._folder) as folder:
            os.replace(name, OWNER, src_dir_fd=folder, dst_dir_fd=folder)
        self._tidy()
        return True

    def _tidy(self) -> None:
        """Removes what killed starters have left; a claim that is made at this moment is withdrawn in any case."""
        for path in self._folder.iterdir():
            if path.name.startswith(CLAIMS):
                with contextlib.suppress(IsADirectoryError, PermissionError):  # no starter's
                    self._unlink(path.name)

    # --- whether another one lives --------------------------------------------------------------------

    def _is_alive(self, holder: Holder) -> bool:
        """Whether an owner is known to be alive; where only time can tell, a sign of life is waited for."""
        if self._is_locked(holder):
            return True
        if holder.owner is not None and holder.owner.is_here:
            return holder.owner.lives()
        if holder.owner is None and self._has_links():
            return False  # no version of dtrain leaves such a file there while it lives
        return self._shows_life(holder)

    def _shows_life(self, holder: Holder) -> bool:
        age = self._age(holder)
        left = min(_STALE_SECONDS, max(0.0, _STALE_SECONDS - age))
        if left > 2 * _BEAT_SECONDS:
            ahead = f" (its time is {-age:,.0f} s in the future and is ignored)" if age < -_STALE_SECONDS else ""
            who = holder.owner or "an owner with an unreadable record"
            logger.warning("%s: waiting up to %.0f s for a heartbeat of %s%s ...", self._shown, left, who, ahead)
        until = time.monotonic() + left
        while time.monotonic() < until:
            now = end_of(self._folder)
            if now is None or now.token != holder.token:
                return True  # there is news: look again
            if now.touched != holder.touched:
                return True
            self._wait(_POLL_SECONDS)
        return False

    def _is_locked(self, holder: Holder) -> bool:
        """Whether a living process holds the lock of an owner's file; shared, so that those who ask disturb nobody."""
        try:
            descriptor = open_below(self._folder, holder.file, os.O_RDONLY)
        except FileNotFoundError:
            return True  # it has gone this moment: look again
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(descriptor)
        return False

    def _has_links(self) -> bool:
        """Whether the file system has hard links, so that no claim is ever seen before its words are there."""
        if self._descriptor < 0:
            self._prepare()
        probe = f"{CLAIMS}{self._me.token}.link"
        try:
            with folder_opened(self._folder) as folder:
                os.link(self._part, probe, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                os.unlink(probe, dir_fd=folder)
        except OSError:
            return False
        return True

    @staticmethod
    def _patience(holder: Holder) -> float:
        """How long an owner that lives is waited for; with one elsewhere, a sign of life was waited for already."""
        return 0.0 if holder.owner is not None and not holder.owner.is_here else _DYING_SECONDS

    def _age(self, holder: Holder) -> float:
        """Returns how long ago a file was touched, by the clock that its times are of: the file server's."""
        probe = f"{CLAIMS}{self._me.token}.clock"
        descriptor = open_below(self._folder, probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            return os.fstat(descriptor).st_mtime - holder.touched
        finally:
            os.close(descriptor)
            self._unlink(probe)

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds)
        by = self._asked()
        if by is not None:
            raise StopRequested(
                f"stopped on request ({by}), while waiting for the owner of {self._shown}; nothing was changed there"
            )

    def _refusal(self, holder: Holder) -> UsageError:
        who = "another process" if holder.owner is None else str(holder.owner)
        return UsageError(f"{self._shown} is in use by {who}. Wait for it, stop it, or choose another run.name.")

    # --- while it is owned ----------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)
                end = end_of(self._folder)
                if end is not None and end.owner != self._me:
                    self._lost = "another process" if end.owner is None else str(end.owner)
                    logger.error("%s was taken over by %s; this run ends.", self._shown, self._lost)
                    return

    def _unlink(self, name: str) -> None:
        with folder_opened(self._folder) as folder, contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def _close(self) -> None:
        _HELD.discard(self)
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # a step may have closed it
                os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):
                self._unlink(self._part)

    def leave_to_parent(self) -> None:
        """In a child that was forked off: it closes the file, so that the lock ends with its parent."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1


def check_all(ownerships: Iterable[Ownership]) -> None:
    """Whether this process still owns all of these folders.

    Raises:
        UsageError: one was taken over; see `Ownership.check`.
    """
    for ownership in ownerships:
        ownership.check()


_HELD: weakref.WeakSet[Ownership] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for ownership in list(_HELD):
        ownership.leave_to_parent()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
