"""The lowest lines of a terminal, drawn again and again below what is printed meanwhile.

The cursor waits above them, on a line of its own. What anything else writes to the terminal (a DataLoader worker,
another rank, a library in C) comes to stand there, whole, and the next drawing goes on below it; rich's Live, whose
cursor waits at the end of its lines, would draw over it. Only ESC D ("down, and scroll where there is no more room")
moves down within the lines, so that to whoever keeps what was printed (`dtrain.launch.terminal.rank_log`) all of them
are one line that is overwritten.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size

from dtrain.launch.terminal.guarded import put

_CLEAR = "\r\x1b[J"
_DOWN = "\r\x1bD"
_REST = "\x1b[K"
_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
# What moves a terminal's cursor, or changes more of it than colours: not for one of several who share it.
_MOVES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b[()][A-Z0-9]|\x1b[78DEHMc]")


class Region:
    """Lines at the bottom of a terminal.

    Args:
        out: the terminal.
        width: returns how wide it is, in cells.
        own: whether this process draws the lines; if not, another one does, on the same terminal, and what is printed
            here makes way for them.
    """

    def __init__(self, out: TextIO, width: Callable[[], int] = lambda: 80, *, own: bool = True) -> None:
        self._out = out
        self._width = width
        self._lines: Sequence[str] = ()
        self._begun = ""  # a printed line whose end has not come yet
        self._lock = threading.RLock()
        self._process = os.getpid() if own else None

    @property
    def is_own(self) -> bool:
        """Whether this process draws it, and is not one that was forked off meanwhile."""
        return os.getpid() == self._process

    def draw(self, lines: Sequence[str]) -> None:
        """Draws these lines, each narrower than the terminal, in place of those before."""
        if not self.is_own:
            return
        with self._lock:
            self._lines = lines
            self._write(self._redrawn())

    def print(self, text: str, begun: str = "") -> None:
        """Prints above the lines, to stay.

        Args:
            text: whole lines.
            begun: the beginning of one.
        """
        if not self.is_own:  # the lines are another's, who will draw them again
            self._write(_CLEAR + text + (f"{begun}\n" if begun else ""))
            return
        with self._lock:
            self._begun = self._fitted(begun)
            self._write(_CLEAR + text + self._redrawn())

    def clear(self) -> None:
        """Takes the lines off the terminal, whose cursor is then where they began."""
        with self._lock:
            begun = f"{self._begun}\n" if self._begun else ""
            self._lines, self._begun = (), ""
            self._write(_CLEAR + begun)

    def _redrawn(self) -> str:
        head = f"\r{self._begun}{_REST}"
        if not self._lines:
            return head
        lines = "".join(f"{_DOWN}{line}{_REST}" for line in self._lines)
        return f"{head}{lines}\x1b[J\r\x1b[{len(self._lines)}A{self._begun}"

    def _fitted(self, begun: str) -> str:
        width = self._width() - 1
        bare = _COLOURS.sub("", begun)
        return begun if cell_len(bare) <= width else set_cell_size(bare, max(0, width))

    def _write(self, text: str) -> None:
        put(text, self._out)


class StdoutProxy:
    """Stands for sys.stdout or sys.stderr: what is printed goes above a region.

    A carriage return takes back the line that has begun, as on any terminal, so that somebody else's bar stays one line
    above the region's.

    Args:
        region: below.
        stream: what it stands for.
    """

    def __init__(self, region: Region, stream: TextIO) -> None:
        self._region = region
        self._stream = stream
        self._begun = ""
        self._lock = threading.RLock()
        self._process = os.getpid()

    def write(self, text: str) -> int:
        """Prints whole lines at once; the beginning of one waits for its end, or for `flush`."""
        if os.getpid() != self._process:  # forked off: another thread may have held the lock
            self._lock, self._process, self._begun = threading.RLock(), os.getpid(), ""
        with self._lock:
            *lines, begun = _MOVES.sub("", self._begun + text).split("\n")
            self._begun = _last_seen(begun)
            if lines:
                whole = "".join(_last_seen(line).rstrip("\r") + "\n" for line in lines)
                self._region.print(whole, self._begun.rstrip("\r") if self._region.is_own else "")
            elif "\r" in text:
                self.flush()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Shows a line that has begun."""
        with self._lock:
            if self._begun:
                self._region.print("", self._begun.rstrip("\r"))
                self._begun = self._begun if self._region.is_own else ""

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self._stream, name)


class StdoutRedirect:
    """Has sys.stdout print above a region, and sys.stderr too where it is a terminal.

    Args:
        region: below.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._stood_for: dict[str, tuple[StdoutProxy, TextIO]] = {}

    def begin(self) -> None:
        """From now on."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                above = StdoutProxy(self._region, stream)
                self._stood_for[name] = (above, stream)
                setattr(sys, name, above)

    def end(self) -> None:
        """As before; what was printed without the end of its line gets one."""
        for name, (above, stream) in self._stood_for.items():
            above.flush()
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
        self._stood_for.clear()


def _last_seen(line: str) -> str:
    """What a carriage return has left of a line; one at its end overwrites nothing yet."""
    return line[line.rfind("\r", 0, len(line.rstrip("\r"))) + 1 :]
