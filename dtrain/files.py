"""Files below a run's folder: no symbolic link there is followed, no FIFO is waited for, no read is without a bound.

A run's folder may lie where others can write. What they have put there must not make dtrain write to, or show, a
file elsewhere. The folder itself is the user's word and may be a link (to a larger disk, say); each name below it is
opened relative to the one above (openat) with O_NOFOLLOW, so that a name that is exchanged meanwhile does no harm
either. A file that has another name elsewhere (a hard link: planted, or of a backup by `cp -al`) is written as a copy
of its own, which takes its place. All files are made with mode 0666, which the process's umask narrows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

MODE = 0o666  # less the umask
PRIVATE = 0o600
_MOST_READ = 64 << 20  # bytes; files of a run's folder that are read whole are far smaller
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISLNK, "a symbolic link, which is not followed"),
    (stat.S_ISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, "a FIFO, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
)


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Returns what tells a folder from another one that is put in its place; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def folder_opened(folder: Path, below: str | PurePath = ".") -> Iterator[int]:
    """Opens a folder below another one; yields its descriptor.

    Args:
        folder: the run's; it may be a link.
        below: relative to it; no part of it may be one.

    Raises:
        OSError: it is not there, or is no folder.
    """
    descriptor = os.open(folder, _FOLDER)
    try:
        path = folder
        for part in PurePath(below).parts:
            path /= part
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                raise _explained(error, part, descriptor, path, folder_wanted=True) from None
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def make_folder(folder: Path, below: str) -> Path:
    """Makes a folder below another one where there is none; what is there must be a folder, and no link to one.

    Raises:
        OSError: it cannot be made.
    """
    path = PurePath(below)
    for depth in range(len(path.parts)):
        with folder_opened(folder, PurePath(*path.parts[:depth])) as parent, contextlib.suppress(FileExistsError):
            os.mkdir(path.parts[depth], dir_fd=parent)
    with folder_opened(folder, path):
        return folder / path


def open_below(folder: Path, name: str | PurePath, flags: int, mode: int = MODE) -> int:
    """Opens a regular file below a folder and returns its descriptor.

    Args:
        folder: the run's; it may be a link.
        name: relative to it; no part of it may be one.
        flags: of `os.open`. O_TRUNC takes effect once the file is known to be one. What is written to a file with
            further hard links is seen under this name alone.
        mode: of a new file, before the umask.

    Raises:
        OSError: it is not there, is something else than a file, or cannot be opened; `strerror` says what it is.
    """
    path = PurePath(name)
    safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with folder_opened(folder, path.parent) as parent:
        try:
            descriptor = os.open(path.name, safe, mode, dir_fd=parent)
        except OSError as error:
            raise _explained(error, path.name, parent, folder / path) from None
        try:
            found = os.fstat(descriptor)
            kind = _kind(found.st_mode)
            if kind:
                raise OSError(errno.EINVAL, f"it is {kind}", str(folder / path))
            linked = found.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR)
            if linked:
                _copy_in_place(folder, path, parent, found)
            elif flags & os.O_TRUNC:
                os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
    if linked:
        os.close(descriptor)
        return open_below(folder, path, flags, mode)
    return descriptor


def _copy_in_place(folder: Path, path: PurePath, parent: int, linked: os.stat_result) -> None:
    """Puts a copy in the place of a file with several hard links, which is then not theirs any more.

    Args:
        folder: the run's.
        path: of the file, relative to it.
        parent: the file's own folder.
        linked: the file. Who may not read it may not read the copy either.
    """
    source = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    with os.fdopen(source, "rb") as file:
        now = os.fstat(source)
        if (now.st_dev, now.st_ino) != (linked.st_dev, linked.st_ino):
            raise OSError(errno.ESTALE, "it is exchanged while it is opened", str(folder / path))
        write_below(folder, path, file.read(), mode=stat.S_IMODE(linked.st_mode) & MODE, sync=True)


def read_below(folder: Path, name: str | PurePath, most: int = _MOST_READ) -> bytes:
    """Returns a file's bytes.

    Args:
        folder: the run's.
        name: relative to it.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is something else than a file, or is larger.
    """
    descriptor = open_below(folder, name, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read() if os.fstat(descriptor).st_size <= most else None
    if data is None:
        raise OSError(errno.EFBIG, f"it is larger than the limit of {most:,} bytes", str(folder / name))
    return data


def read_text_below(folder: Path, name: str | PurePath, most: int = _MOST_READ) -> str:
    """Returns a file's text.

    Raises:
        OSError: as for `read_below`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_below(folder, name, most).decode("utf-8")


def append_whole(descriptor: int, data: bytes, path: Path, *, sync: bool) -> None:
    """Appends to an open file by one write, so that a kill leaves all of it or nothing.

    Args:
        descriptor: of the file, opened with O_APPEND.
        data: what is appended.
        path: the file's, for the message.
        sync: whether it is on the disk when this returns.

    Raises:
        OSError: it could not be written whole.
    """
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, "it was not written completely; is the disk full?", str(path))
    if sync:
        os.fsync(descriptor)


def append_line(descriptor: int, line: bytes, path: Path, *, sync: bool = False) -> None:
    """Appends a line to an open file by one write; where the last one is torn, as by a full disk, below that one.

    Args:
        descriptor: of the file, opened with O_RDWR and O_APPEND.
        line: with its end.
        path: the file's, for the message.
        sync: whether it is on the disk when this returns.

    Raises:
        OSError: it could not be written whole.
    """
    size = os.fstat(descriptor).st_size
    torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
    append_whole(descriptor, b"\n" + line if torn else line, path, sync=sync)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that gets its name once it is whole and on the disk; where that fails, nothing of it is left.

    Args:
        path: a file that a user named, in a folder of theirs; below a run's folder it is `write_below` that writes.

    Raises:
        OSError: it cannot be written; the file that was there is as it was.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_below(
    folder: Path, name: str | PurePath, data: str | bytes | Iterable[bytes], *, mode: int = MODE, sync: bool = False
) -> None:
    """Writes a file whole or not at all: under another name first. A link in its place is replaced, not followed.

    Args:
        folder: the run's.
        name: relative to it; its own folder is there.
        data: text is written as UTF-8; of what is too large for the memory its parts.
        mode: of the file, before the umask.
        sync: whether it is on the disk before it gets its name.

    Raises:
        OSError: it could not be written; the file that was there is as it was.
    """
    path = PurePath(name)
    part = path.with_name(f".{path.name}.part")
    with folder_opened(folder, path.parent) as parent:
        try:
            descriptor = _new(folder, part, parent, mode)
            with os.fdopen(descriptor, "wb") as file:
                whole = data.encode() if isinstance(data, str) else data
                file.writelines([whole] if isinstance(whole, bytes) else whole)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part.name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                os.unlink(part.name, dir_fd=parent)
            raise


def _new(folder: Path, part: PurePath, parent: int, mode: int) -> int:
    """Makes a file that is nobody else's, in place of what a kill, or somebody, has left there."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part.name, dir_fd=parent)
        with contextlib.suppress(FileExistsError):  # another process writes the same file at this moment
            return open_below(folder, part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def aside_name(folder: Path, name: str) -> str:
    """Returns the first name of the form "history-1.csv" that nothing in a folder has."""
    path = PurePath(name)
    names = (f"{path.stem}-{number}{path.suffix}" for number in range(1, 10_000))
    return next(one for one in names if not os.path.lexists(folder / one))


def what_is(path: Path) -> str:
    """Returns what stands in a file's place, as "a FIFO, not a file"; nothing where that is a file, or is not there."""
    try:
        return _kind(os.lstat(path).st_mode)
    except OSError:
        return ""


def _kind(mode: int) -> str:
    return next((words for is_one, words in _KINDS if is_one(mode)), "")


def _explained(error: OSError, name: str, parent: int, path: Path, *, folder_wanted: bool = False) -> OSError:
    """The same error with words that say what is in the way."""
    try:
        kind = _kind(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        kind = ""
    if folder_wanted and not kind and error.errno == errno.ENOTDIR:
        kind = "no folder"
    if kind and not isinstance(error, FileExistsError) and not (folder_wanted and kind.startswith("a folder")):
        return OSError(errno.ELOOP if kind.startswith("a symbolic") else errno.EINVAL, f"it is {kind}", str(path))
    return OSError(error.errno, error.strerror, str(path))
