"""What ranks write goes through their supervisor: to its own output, as it comes, and to each rank's log.

Each rank gets what the supervisor has: a terminal of its own where that writes to a terminal, so that a progress bar
stays one, else a pipe. Lines of two ranks never run into each other. A thread does it, so that an output that
nobody reads (a terminal that is paused) holds up the ranks, as it always does, and not the watch over them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.files import make_folder
from dtrain.launch.terminal.guarded import readers_may_go, say
from dtrain.launch.terminal.rank_log import RankLog
from dtrain.launch.terminal.screen import Screen, same_size, screens, terminal_like

_CHUNK, _MOST_CHUNKS = 65536, 64
_LOOK_SECONDS = 0.5  # for the run's folder, and for another size of the terminal


@dataclass(eq=False)
class _Source:
    """One end of a pipe or terminal that a rank writes to."""

    rank: int
    file: int
    screen: Screen
    is_terminal: bool


@dataclass
class _Ends:
    """The ranks' ends, which this process holds until they are started."""

    files: list[int] = field(default_factory=list)

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files.clear()


class Output:
    """Shows and keeps what ranks write.

    Args:
        logs: returns the folder of the logs, None as long as there is none.
        stop: gets the signals that come; then an output that nobody reads is not waited for.
        apart: whether other ranks, whose outputs go to the same place, have supervisors of their own.

    Attributes:
        environment: further variables for every rank: none.
    """

    environment: Mapping[str, str] = {}

    def __init__(self, logs: Callable[[], Path | None], stop: Sequence[int], *, apart: bool = False) -> None:
        self._find_logs = logs
        self._stop = stop
        self._screens = screens()
        for screen in self._screens:
            screen.by_lines = apart
        self._sources: list[_Source] = []
        self._ends = _Ends()
        self._logs: dict[int, RankLog] = {}
        self._logging = False
        self._warned = self._lost = False
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="dtrain-output", daemon=True)

    def channels(self, rank: int) -> tuple[int, int]:
        """Returns the file descriptors that a rank shall have as its standard output and error."""
        out, err = self._screens
        self._logs[rank] = RankLog(rank)
        stdout = self._channel(rank, out)
        # One for both keeps the order of what is written where both go to the same place.
        return stdout, stdout if err is out else self._channel(rank, err)

    def start(self, _processes: Sequence[object]) -> None:
        """All ranks are started: begins to read."""
        self._ends.close()
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Lets some seconds pass; what comes is passed on meanwhile."""
        time.sleep(seconds)

    def close(self, exit_messages: Mapping[int, str]) -> None:
        """Shows and keeps what is left once the ranks have ended.

        Args:
            exit_messages: rank -> what its log shall end with.
        """
        self._ends.close()
        os.write(self._waker, b"x")
        if self._thread.ident is None:
            self._thread.start()
        while self._thread.is_alive() and not self._stop:
            self._thread.join(0.1)
        self._thread.join(1.0)
        if self._thread.is_alive():
            return
        os.close(self._wake)
        os.close(self._waker)
        for rank, text in exit_messages.items():
            self._keep(rank, text.encode(errors="replace"))
        self._close_logs()

    def end_lines(self) -> None:
        """Something else is to be printed: it begins on a line of its own, on a terminal in order."""
        if not self._thread.is_alive():
            for screen in set(self._screens):
                screen.end_line()

    def _channel(self, rank: int, screen: Screen) -> int:
        pair = terminal_like(screen)
        ours, theirs = pair or os.pipe()
        os.set_blocking(ours, False)
        self._ends.files.append(theirs)
        source = _Source(rank, ours, screen, pair is not None)
        self._sources.append(source)
        self._selector.register(ours, selectors.EVENT_READ, source)
        return theirs

    # --- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._pass_on():
                pass
            for source in list(self._sources):
                # No more than a pipe holds: a process that outlives its rank may write for ever.
                for _ in range(_MOST_CHUNKS):
                    if not self._read(source):
                        break
            for screen in set(self._screens):
                screen.release(all_of_it=True)
            self._open_logs()
        finally:  # also of a fault of this thread: no rank shall wait for a reader
            for source in list(self._sources):
                self._drop(source)
            self._selector.close()

    def _pass_on(self) -> bool:
        """Waits for something to do, and does it; returns whether there may be more."""
        waiting = [moment for screen in set(self._screens) if (moment := screen.next_release()) is not None]
        seconds = max(0.0, min(waiting) - time.monotonic()) if waiting else self._pause()
        ended = False
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                ended = True
            else:
                self._read(key.data)
        for screen in set(self._screens):
            screen.release()
        self._open_logs()
        same_size([source.file for source in self._sources if source.is_terminal], self._screens)
        return not ended

    def _pause(self) -> float | None:
        looks = not self._logging or any(source.is_terminal for source in self._sources)
        return _LOOK_SECONDS if looks else None

    def _read(self, source: _Source) -> bool:
        """Passes one chunk on; returns whether there may be more."""
        try:
            chunk = os.read(source.file, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:  # a terminal's other end is closed
            if error.errno != errno.EIO:
                raise
            chunk = b""
        if not chunk:
            self._drop(source)
            return False
        self._keep(source.rank, chunk)
        source.screen.show(source, chunk)
        for trouble in source.screen.troubles():
            self._note_lost(trouble)
        return True

    def _drop(self, source: _Source) -> None:
        self._sources.remove(source)
        self._selector.unregister(source.file)
        os.close(source.file)

    # --- the logs ------------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        if self._logging or (folder := self._find_logs()) is None:
            return
        self._logging = True
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_folder(folder.parent, folder.name)
            for log in self._logs.values():
                log.open(folder)
        except OSError as error:
            self._stop_logging(error)

    def _keep(self, rank: int, chunk: bytes) -> None:
        try:
            if rank in self._logs:
                self._logs[rank].add(chunk)
        except OSError as error:
            self._stop_logging(error)

    def _close_logs(self) -> None:
        try:
            for log in self._logs.values():
                log.close()
        except OSError as error:
            self._stop_logging(error)

    def _stop_logging(self, error: OSError) -> None:
        logs, self._logs = self._logs, {}
        for log in logs.values():
            with contextlib.suppress(OSError):
                log.close()
        self._warn(f"the ranks' logs cannot be written ({error.strerror}); the run continues without them")

    def _note_lost(self, why: str) -> None:
        """Says once, where it can still be read, that what ranks write is no longer shown; they never learn of it."""
        if not self._lost:
            self._lost = True
            words = f"output cannot be written ({why}), since {time.strftime('%H:%M:%S')}; the run continues"
            try:
                for rank in sorted(self._logs)[:1]:
                    self._logs[rank].note(f"{words}, and the ranks' logs keep it")
            except OSError as error:
                self._stop_logging(error)
            if not readers_may_go():
                self._warn(words)

    def _warn(self, trouble: str) -> None:
        if not self._warned:
            self._warned = True
            self._screens[1].end_line()
            say(f"dtrain: warning: {trouble}.")
