"""A log for each rank: what it wrote to its standard output and error, kept for a look afterwards."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dtrain.files import open_below
from dtrain.launch.terminal.screen import write_all

# What a rank writes before its run has a folder: so much of it is held in memory, the rest is counted.
_MOST_HELD = 1 << 20
_LONGEST_LINE = 1 << 16
_CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")  # of a terminal: colours, where the cursor goes


class RankLog:
    """Lines as they were last seen: what a progress bar overwrote is left out, and so are a terminal's colours.

    Args:
        rank: whose.
    """

    def __init__(self, rank: int) -> None:
        self._name = f"rank-{rank}.log"
        self._file: int | None = None
        self._held = bytearray()
        self._dropped = 0
        self._line = b""  # its end has not come yet

    def open(self, folder: Path) -> None:
        """Continues a file of the folder, at its end; what was held comes first.

        Raises:
            OSError: it cannot be made or written.
        """
        self._file = open_below(folder.parent, f"{folder.name}/{self._name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if self._dropped:
            self._held += b"\n[dtrain: %d bytes came before the run had a folder and were not kept]\n" % self._dropped
        self._write(bytes(self._held))
        self._held.clear()

    def add(self, chunk: bytes) -> None:
        """Takes what the rank wrote, in pieces of any size.

        Raises:
            OSError: it cannot be written.
        """
        data = self._line + chunk
        whole = data.rfind(b"\n") + 1
        self._line = _last_seen(data[whole:])
        if len(self._line) > _LONGEST_LINE:
            whole, self._line = len(data), b""
        self._write(b"\n".join(map(_last_seen, data[:whole].split(b"\n"))) if b"\r" in data else data[:whole])

    def note(self, text: str) -> None:
        """Adds a line of dtrain's own.

        Raises:
            OSError: it cannot be written.
        """
        self.add(f"{chr(10) if self._line else ''}[dtrain: {text}]\n".encode())

    def close(self) -> None:
        """Writes a last line that has no end, and closes the file.

        Raises:
            OSError: it cannot be written.
        """
        line, self._line = self._line, b""
        try:
            self._write(line)
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _write(self, data: bytes) -> None:
        data = _CONTROL.sub(b"", data) if b"\x1b" in data else data
        if self._file is not None:
            write_all(self._file, data)
            return
        room = _MOST_HELD - len(self._held)
        self._held += data[:room]
        self._dropped += max(0, len(data) - room)


def _last_seen(line: bytes) -> bytes:
    """What of a line is left on a screen; a carriage return at its end overwrites nothing yet."""
    return line[line.rfind(b"\r", 0, len(line.rstrip(b"\r"))) + 1 :]
