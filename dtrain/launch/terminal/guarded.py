"""Standard output and error that take no work with them: a write that fails is noted once, and the process runs on.

Whoever reads the output may go (`| head`; `| tee log`, which a terminal's Ctrl-C ends first), the disk of a log file
may be full, the terminal may be closed, and characters may not exist in its encoding. None of this is a reason to end
a training. What is lost is said where it is still read: in the run's own log.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dtrain.files import make_folder, open_below
from dtrain.launch.signals.exiting import reserve_standard_descriptors
from dtrain.launch.terminal.screen import write_all
from dtrain.wording import wrapped

_NAMES = {1: "standard output", 2: "standard error"}
_FOR_GOOD = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody will ever read there again
_REPLACING = "dtrain-replace"  # an error handler of codecs

_COLUMNS = 80  # of a terminal that does not say

_lost: dict[str, str] = {}  # name of an output -> what happened to it
_logs: list[tuple[Path, str]] = []  # a run's folder, and a log below it
_readers_matter: list[bool] = []


def guard_output() -> None:
    """Replaces this process's sys.stdout and sys.stderr by streams that never raise, whatever becomes of their files.

    Characters that the encoding has not are replaced. A stream that is no file of the process's own, such as a
    notebook's or a test's, stays as it is. For programs, whose streams are their own; a library does not do this.
    """
    closed = [number for number in _NAMES if not _is_open(number)]
    reserve_standard_descriptors()
    for number in closed:
        note_lost(_NAMES[number], "closed from the start")
    codecs.register_error(_REPLACING, _replaced)
    for number, name in ((1, "stdout"), (2, "stderr")):
        found = getattr(sys, name)
        if found is None or _file_of(found) == number:
            setattr(sys, name, _guarded(found, number))


def say(text: str) -> None:
    """Prints a message to the standard error, as `put` does; on a terminal its lines break at words."""
    put(f"{on_screen(text, sys.stderr)}\n", sys.stderr)


def on_screen(text: str, out: TextIO | None) -> str:
    """Returns a message as a stream shows it: broken at words to a terminal's width, as it is anywhere else."""
    try:
        file = None if out is None or not out.isatty() else _file_of(out)
        return text if file is None else wrapped(text, os.get_terminal_size(file).columns or _COLUMNS)
    except (OSError, ValueError, AttributeError):
        return text


def put(text: str, out: TextIO | None) -> None:
    """Writes to a stream at once and in one piece, so that lines of other processes do not run into it; never raises.

    For all that dtrain prints by itself, also in processes whose streams are not guarded.

    Args:
        text: what the stream cannot encode becomes a question mark.
        out: the stream; nothing is written where the user's code has taken it away.
    """
    if out is None or getattr(out, "closed", False):
        return
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        out.write(text.encode(encoding, errors="replace").decode(encoding))
        out.flush()
    except (OSError, ValueError) as error:
        note_lost(_NAMES.get(_file_of(out) or 0, "output"), getattr(error, "strerror", None) or str(error))


def write_now(file: int, text: str) -> None:
    """Writes to a file descriptor if that is possible at once, for signal handlers; never raises, never waits."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(file, select.POLLOUT)
        if poll.poll(0):
            os.write(file, text.encode(errors="replace"))


def note_lost(name: str, why: str) -> None:
    """Notes, once for each output, that it can no longer be written, and says so in the run's log if there is one."""
    if name in _lost:
        return
    _lost[name] = f"[dtrain: {name} cannot be written ({why}), since {time.strftime('%H:%M:%S')}; the run continues]"
    for folder, log in _logs:
        _log(folder, log, _lost[name])


def note_losses_in(folder: Path, rank: int) -> None:
    """Says in a rank's log of a run what outputs are lost, those from before and those to come.

    Args:
        folder: the run's.
        rank: which log.
    """
    place = (folder, f"logs/rank-{rank}.log")
    if place not in _logs:
        _logs[:] = [place]
        for line in _lost.values():
            _log(*place, line)


@contextlib.contextmanager
def readers_matter() -> Iterator[None]:
    """While inside, a reader of the standard output who goes ends the work, whose only result is what is printed.

    Raises:
        BrokenPipeError: of a write in here.
    """
    _readers_matter.append(True)
    try:
        yield
    finally:
        _readers_matter.pop()


def readers_may_go() -> bool:
    """Whether a reader of the standard output who goes is no trouble here, but has seen enough."""
    return bool(_readers_matter)


class _File(io.RawIOBase):
    """A file descriptor to write to. What it does not take is dropped."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._process = os.getpid()
        self.name = f"<{'stdout' if file == 1 else 'stderr'}>"
        self.mode = "wb"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def isatty(self) -> bool:
        return os.isatty(self._file)

    def write(self, data: Any) -> int:
        try:
            write_all(self._file, data)
        except OSError as error:
            if self._file == 1 and _readers_matter and isinstance(error, BrokenPipeError):
                raise
            self._lose(error)
        return memoryview(data).nbytes

    def _lose(self, error: OSError) -> None:
        if error.errno in _FOR_GOOD:  # so that code below Python and child processes do not trip over it either
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device
                os.dup2(nothing.fileno(), self._file)
        if os.getpid() == self._process:  # of forked processes, the first one says it
            note_lost(_NAMES[self._file], error.strerror or str(error))


def _guarded(found: TextIO | None, number: int) -> TextIO:
    errors = getattr(found, "errors", "strict")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.flush()  # type: ignore[union-attr]
    unbuffered = bool(getattr(found, "write_through", False))  # python -u
    file = _File(number)
    return io.TextIOWrapper(
        file if unbuffered else io.BufferedWriter(file),
        encoding=getattr(found, "encoding", None) or "utf-8",
        errors=_REPLACING if errors in ("strict", "surrogateescape") else errors,
        line_buffering=number == 2 or unbuffered or os.isatty(number),
        write_through=unbuffered,
    )


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name that are no text come back as they were; all else becomes a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return b"".join(_one(char) for char in part), error.end


def _one(char: str) -> bytes:
    return bytes([ord(char) - 0xDC00]) if 0xDC80 <= ord(char) <= 0xDCFF else b"?"


def _log(folder: Path, log: str, line: str) -> None:
    with contextlib.suppress(OSError):  # there is no other place
        make_folder(folder, "logs")
        file = open_below(folder, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)


def _file_of(stream: object) -> int | None:
    try:
        return int(stream.fileno())  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return None


def _is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True
