"""Passes on what ranks write, as it comes, to this process's own sys.stdout and sys.stderr.

A notebook shows what its own process prints, not what a child writes to the file descriptors that it inherited.
"""

from __future__ import annotations

import codecs
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from dtrain.launch.terminal.guarded import put

# Python holds back what it writes to a pipe, and may write it in another encoding.
RELAYED_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
_CHUNK = 65536

Stream = Literal["stdout", "stderr"]


class NotebookOutput:
    """`Relay` in the form that a supervisor uses, in place of `dtrain.launch.terminal.tty_relay`.

    Args:
        meanwhile: called each time that there was something to pass on, or nothing for a while; True is nothing.

    Attributes:
        environment: further variables for every rank.
    """

    environment: Mapping[str, str] = RELAYED_ENVIRONMENT

    def __init__(self, meanwhile: bool | Callable[[], None] = True) -> None:
        self._meanwhile = None if isinstance(meanwhile, bool) else meanwhile
        self._relay = Relay()
        self._ranks: list[int] = []

    def channels(self, rank: int) -> tuple[int, int]:
        """Returns what a rank shall have as its standard output and error."""
        self._ranks.append(rank)
        return subprocess.PIPE, subprocess.PIPE

    def start(self, processes: Sequence[object]) -> None:
        """All ranks are started."""
        for rank, process in zip(self._ranks, processes, strict=True):
            assert isinstance(process, subprocess.Popen)  # noqa: S101 - for the type checker
            self._relay.add(rank, process)

    def wait(self, seconds: float) -> None:
        """Passes on what comes, some seconds at most."""
        self._relay.wait(seconds)
        if self._meanwhile is not None:
            self._meanwhile()

    def close(self, _last_words: Mapping[int, str]) -> None:
        """Passes on what is left once the ranks have ended."""
        self._relay.close()

    def end_lines(self) -> None:
        """Each rank's lines have ended already."""


class Relay:
    """Reads the pipes of all ranks in the thread that calls it, so that a notebook knows which cell printed.

    Rank 0's lines come out as they are, the others' with "[rank N] " before them.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def add(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Takes over the pipes of a rank that was started with stdout and stderr as pipes."""
        for stream, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            assert pipe is not None  # noqa: S101 - for the type checker
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Lines(rank, stream))

    def wait(self, seconds: float) -> None:
        """Returns when there was something to pass on, or after some seconds."""
        for key, _ in self._selector.select(seconds):
            self._read(key)

    def close(self) -> None:
        """Passes on what is left once the ranks have ended.

        It does not wait for the pipes' end: a process that outlives its rank may hold them open for ever.
        """
        for key in list(self._selector.get_map().values()):
            while self._read(key):
                pass
        for key in list(self._selector.get_map().values()):
            self._end(key)
        self._selector.close()

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Passes one chunk on; returns whether there may be more."""
        try:
            chunk = os.read(key.fd, _CHUNK)
        except BlockingIOError:
            return False
        if chunk:
            key.data.add(chunk)
        else:
            self._end(key)
        return bool(chunk)

    def _end(self, key: selectors.SelectorKey) -> None:
        self._selector.unregister(key.fileobj)
        pipe: Any = key.fileobj
        pipe.close()
        key.data.end()


class _Lines:
    """One stream of one rank, cut into lines; a carriage return ends one too, as progress bars do."""

    def __init__(self, rank: int, stream: Stream | str) -> None:
        self._prefix = f"[rank {rank}] " if rank else ""
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""

    def add(self, chunk: bytes) -> None:
        """Prints the lines that are whole now."""
        text = self._held + self._decode(chunk)
        whole = max(text.rfind("\n"), text.rfind("\r")) + 1
        self._held = text[whole:]
        self._print(text[:whole])

    def end(self) -> None:
        """Prints a last line that has no end."""
        self._print(self._held)
        self._held = ""

    def _print(self, text: str) -> None:
        if not text:
            return
        lines = text.splitlines(keepends=True) if self._prefix else [text]
        # Looked up each time: a notebook replaces it.
        put("".join(self._prefix + line for line in lines), getattr(sys, self._stream))
