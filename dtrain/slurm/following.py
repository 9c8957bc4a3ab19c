"""The output of a job or of a rank, as it is written, until the job has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from dtrain.errors import SlurmError
from dtrain.slurm.runs import RunJob, refreshed

_CHUNK = 1 << 16
_LOOK_SECONDS = 0.3  # between looks at the file
_ASK_SECONDS, _LONGEST_ASK_SECONDS = 2.0, 10.0  # between questions to slurmctld, which all users share
_MOST_FAILURES = 20  # one after the other; a busy slurmctld may miss some questions
_LATE_SECONDS = 1.5  # a shared file system shows here what a node wrote a moment ago


class Tail:
    """A file that grows, and may not be there yet.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0

    def read(self) -> bytes:
        """Returns what has come since, 64 KiB at most; nothing where the file is not there."""
        try:
            with self.path.open("rb") as file:
                if self._place > file.seek(0, 2):
                    self._place = 0  # it was begun anew
                file.seek(self._place)
                data = file.read(_CHUNK)
        except FileNotFoundError:
            return b""
        self._place += len(data)
        return data

    def rest(self, write: Callable[[bytes], object]) -> bool:
        """Writes all that has come since; returns whether there was anything."""
        came = False
        while data := self.read():
            write(data)
            came = True
        return came


def follow(
    tail: Tail,
    one: RunJob,
    write: Callable[[bytes], object],
    tell: Callable[[str], object],
) -> RunJob:
    """Passes a file on as it grows, until the job has ended and all of it is passed on.

    SLURM is asked only while nothing comes, and not more often than every 2 s.

    Args:
        tail: the file.
        one: the job.
        write: gets what has come.
        tell: gets words for a person, such as why the job waits.

    Returns:
        the job, as it was last seen.

    Raises:
        SlurmError: slurmctld has not answered for minutes.
    """
    pause, next_ask, told, failures = _ASK_SECONDS, 0.0, "", 0
    while True:
        if tail.rest(write):
            pause = _ASK_SECONDS
        elif time.monotonic() >= next_ask:
            try:
                (one,) = refreshed([one], needed_for="dtrain logs -f")
                failures, words = 0, waiting_words(one)
            except SlurmError as error:
                failures, words = failures + 1, f"{error}; retrying"
                if failures > _MOST_FAILURES:
                    raise
            if one.is_over:
                _last_words(tail, write)
                return one
            if words != told:
                told = words
                tell(words)
            next_ask = time.monotonic() + pause
            pause = min(pause * 1.5, _LONGEST_ASK_SECONDS)
        time.sleep(_LOOK_SECONDS)


def waiting_words(one: RunJob) -> str:
    """Returns "job 123 (run digits) waits: Resources (no free nodes)"; nothing for one that does not."""
    if one.job is None or not one.job.waits:
        return ""
    again = " to start again" if one.job.restarts else ""
    return f"{one.words} waits{again}{f': {one.why}' if one.why else ''}"


def _last_words(tail: Tail, write: Callable[[bytes], object]) -> None:
    deadline = time.monotonic() + _LATE_SECONDS
    while time.monotonic() < deadline:
        tail.rest(write)
        time.sleep(_LOOK_SECONDS)
    tail.rest(write)
