"""A terminal that is a stream in the test's own process."""

from __future__ import annotations

import pyte


class Screen:
    """A stream with an emulated terminal behind it."""

    encoding = "utf-8"

    def __init__(self, columns: int = 40, rows: int = 12) -> None:
        self.emulator = pyte.Screen(columns, rows)
        self._stream = pyte.Stream(self.emulator)
        self.written = ""
        self.writes = 0

    def write(self, text: str) -> int:
        self.written += text
        self.writes += 1
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        found = [line.rstrip() for line in self.emulator.display]
        while found and not found[-1]:
            found.pop()
        return found
