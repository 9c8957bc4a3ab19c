"""One of the supervisor's own outputs, shared by ranks that take turns by lines."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import struct
import sys
import time
from collections.abc import Iterable, Sequence

# How long a rank's output waits for the end of a line that another one has begun. A progress bar never ends its line.
_PATIENCE_SECONDS = 0.25
_SHOW_CURSOR = b"\x1b[?25h"
# Lines that are drawn again and again, below a cursor that waits above them (`dtrain.callbacks.progress.region`):
# whoever writes next clears them away.
_WAITING = re.compile(rb"\r\x1b\[\d+A[^\r\n]*$")
_CLEAR = b"\r\x1b[J"
_BELOW = b"\x1b[J"


class Screen:
    """An output that ranks share. A line that one has begun is its own until it ends, or until others lose patience.

    Args:
        file: its file descriptor; None where it is closed, so that nothing is shown.

    Attributes:
        by_lines: whether other processes, which cannot be asked, write lines there, too. One that was begun then waits
            for its end for a moment, so as to be written in one piece, but on a terminal.
    """

    def __init__(self, file: int | None) -> None:
        self.file = file
        self.closed = False
        self.is_terminal = file is not None and os.isatty(file)
        self.by_lines = False
        self._begun: tuple[object, bytes, float] | None = None  # who, what, until when
        self._owner: object | None = None
        self._drawn_by: object | None = None
        self._held: list[tuple[object, bytes, float]] = []  # who, what, until when
        self._troubles: list[str] = []

    def show(self, source: object, chunk: bytes) -> None:
        """Shows what a source has written, now or as soon as the line is free."""
        if self.by_lines and not self.is_terminal:
            chunk = self._whole_lines(source, chunk)
        if not chunk:
            return
        if self._owner in (None, source) and not self._held:
            self._write(source, chunk)
        else:
            self._held.append((source, chunk, time.monotonic() + _PATIENCE_SECONDS))
            self.release()

    def release(self, *, all_of_it: bool = False) -> None:
        """Shows what was held and may be shown now."""
        now = time.monotonic()
        if self._begun is not None and (all_of_it or now >= self._begun[2]):
            (source, chunk, _), self._begun = self._begun, None
            self._write(source, chunk)
        while self._held:
            # Who owns the line goes on with it first.
            index = next((i for i, (source, *_) in enumerate(self._held) if source is self._owner), 0)
            source, chunk, until = self._held[index]
            if self._owner not in (None, source):
                if now < until and not all_of_it:
                    return
                self._write(source, b"\n")
            del self._held[index]
            self._write(source, chunk)

    def next_release(self) -> float | None:
        """When to call `release` again, on the monotonic clock; None where nothing is held."""
        waiting = [one[2] for one in (*self._held[:1], self._begun) if one is not None]
        return min(waiting, default=None)

    def _whole_lines(self, source: object, chunk: bytes) -> bytes:
        """Keeps the line that a chunk leaves without an end; returns what comes before, with what was kept."""
        _, before, until = self._begun or (source, b"", time.monotonic() + _PATIENCE_SECONDS)
        chunk = before + chunk
        whole = chunk[: chunk.rfind(b"\n") + 1]
        rest = chunk[len(whole) :]
        until = time.monotonic() + _PATIENCE_SECONDS if whole else until
        self._begun = (source, rest, until) if rest else None
        return whole

    def troubles(self) -> list[str]:
        """Returns why what was to be shown was not, since the last call."""
        found, self._troubles = self._troubles, []
        return found

    def end_line(self) -> None:
        """Ends a line that was begun; a terminal's cursor, which a bar may have hidden, is seen again."""
        if self._drawn_by is not None:
            self._write(None, _CLEAR + _SHOW_CURSOR)
        elif self._owner is not None:
            self._write(None, (_SHOW_CURSOR if self.is_terminal else b"") + b"\n")

    def _write(self, source: object | None, chunk: bytes) -> None:
        if self._drawn_by not in (None, source):
            chunk = _CLEAR + chunk
        elif self._drawn_by is not None and not chunk.startswith(b"\r"):  # its own C code, which knows of no lines
            chunk = _BELOW + chunk
        drawn = self.is_terminal and _WAITING.search(chunk) is not None
        self._owner = None if chunk.endswith(b"\n") or drawn else source
        self._drawn_by = source if drawn else None
        if self.file is None or self.closed:
            return
        try:
            write_all(self.file, chunk)
        except OSError as error:
            self.closed = error.errno in (errno.EPIPE, errno.EIO)  # nobody will ever read here again
            self._troubles.append(error.strerror or str(error))


def fresh_line(file: int) -> str:
    """Returns what to write before a line that comes at any time: on a terminal, where ^C or bars may stand."""
    if not os.isatty(file):
        return ""
    return "\n" if os.environ.get("TERM", "dumb") == "dumb" else "\n\x1b[J"


def screens() -> tuple[Screen, Screen]:
    """Returns this process's standard output and error: the same object twice where both go to the same place."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # what this process has printed comes first
    out, err = _place(1), _place(2)
    first = Screen(None if out is None else 1)
    return (first, first) if out == err else (first, Screen(None if err is None else 2))


def terminal_like(screen: Screen) -> tuple[int, int] | None:
    """Returns both ends of a terminal, ours and a rank's, where the screen is one; None where it is none."""
    if not screen.is_terminal:
        return None
    try:
        import tty

        ours, theirs = os.openpty()
    except (ImportError, OSError):  # there are no more of them
        return None
    tty.setraw(theirs)  # bytes pass as they are; the real terminal does the rest
    same_size([ours], [screen])
    return ours, theirs


def same_size(terminals: Iterable[int], of: Sequence[Screen]) -> None:
    """Gives terminals the size of the one that is a screen; cheap where nothing has changed."""
    size = next((size for screen in of if screen.is_terminal and (size := _size(screen.file)) is not None), None)
    if size is None:
        return
    import fcntl
    import termios

    for terminal in terminals:
        if _size(terminal) != size:
            with contextlib.suppress(OSError):
                fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def _size(file: int | None) -> bytes | None:
    import fcntl
    import termios

    if file is None:
        return None
    try:
        return fcntl.ioctl(file, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    except OSError:
        return None


def _place(file: int) -> tuple[int, int, int] | None:
    """Tells outputs apart that lead to different files, pipes or terminals; None where it is closed."""
    try:
        stat = os.fstat(file)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_rdev


def write_all(file: int, data: bytes) -> None:
    """Writes all of it, in as many pieces as the system takes it.

    Raises:
        OSError: the system does not take it.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(file, view) :]
        except BlockingIOError as error:  # somebody has made it non-blocking
            if error.errno != errno.EAGAIN:
                raise
            poll = select.poll()  # not select(), which takes no descriptor above 1023
            poll.register(file, select.POLLOUT)
            poll.poll()
