"""A command on a real terminal, whose screen a test can read: a pty with a terminal emulator behind it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyte

from helpers.commands import clean_environment

PATIENCE = 90.0
_DRAWING = re.compile(rb".*?\x1b\[\d+A|.+\Z", re.DOTALL)  # it ends with the cursor's way back


class Terminal:
    """A terminal and what is on it.

    Args:
        file: our end of the pty.
        columns: its width.
        rows: its height.

    Attributes:
        seen: all bytes that came.
        frames: what was on the screen each time that bytes had come, and after each drawing among them.
    """

    def __init__(self, file: int, columns: int, rows: int) -> None:
        self.seen = b""
        self.frames: list[list[str]] = []
        self._file = file
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """Gives the terminal another size; whoever runs on it is not told, as when it has not asked for SIGWINCH."""
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    @property
    def lines(self) -> list[str]:
        """The lines of the screen that are not empty."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def read(self, seconds: float) -> bool:
        """Takes what comes; returns False once nobody writes any more."""
        if not select.select([self._file], [], [], seconds)[0]:
            return True
        try:
            chunk = os.read(self._file, 65536)
        except OSError:  # the other end is closed
            return False
        self.seen += chunk
        for piece in _DRAWING.findall(chunk):  # a test that comes late sees each of them all the same
            self._stream.feed(piece)
            self.frames.append(self.lines)
        return bool(chunk)

    def until(self, there: Callable[[], object], what: str) -> None:
        """Reads until something is true."""
        deadline = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < deadline, f"waited in vain: {what}\n{self.text}"
            assert self.read(0.05), f"it ended before: {what}\n{self.text}"

    def type(self, text: str) -> None:
        """Types as a person does."""
        os.write(self._file, text.encode())

    def to_the_end(self) -> None:
        """Reads until nobody writes any more."""
        deadline = time.monotonic() + PATIENCE
        while self.read(0.05):
            assert time.monotonic() < deadline, f"it does not end\n{self.text}"


@contextmanager
def on_terminal(
    argv: list[object], folder: Path, *, columns: int, rows: int = 40, **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """Runs a command on a terminal of its own; what still runs at the end is killed."""
    ours, theirs = os.openpty()
    terminal = Terminal(ours, columns, rows)
    environment = clean_environment(**{"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **env})
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        if name not in env:
            environment.pop(name, None)
    process = subprocess.Popen(
        [str(word) for word in argv],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, terminal
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)
