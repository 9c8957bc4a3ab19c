"""What happens in a run as JSON, one object a line, for programs to read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.errors import EXIT_STOPPED
from dtrain.launch.terminal.guarded import note_lost
from dtrain.launch.terminal.screen import write_all

if TYPE_CHECKING:
    from dtrain.launch.supervisor import JobEnd


class Events:
    """Writes events, each in one piece, so that those of several ranks never run into each other.

    Args:
        file: the file descriptor, by default the standard output.

    Attributes:
        rank: named in each event; None leaves it out.
    """

    def __init__(self, file: int = 1) -> None:
        self.rank: int | None = None
        self._file = file
        self._lock = threading.Lock()

    def take_stdout(self) -> None:
        """From here on nothing but events is on the standard output: what else is printed goes to standard error."""
        sys.stdout.flush()
        self._file = os.dup(1)
        try:
            os.dup2(2, 1)
        except OSError:  # there is no standard error
            with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device
                os.dup2(nothing.fileno(), 1)
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def tell(self, event: str, **facts: Any) -> None:
        """Writes one event.

        Args:
            event: what happened.
            facts: what is to be said of it. Numbers keep all their digits; NaN and the infinities, which JSON has not,
                become the texts "nan", "inf" and "-inf", as in history.csv.
        """
        who = {} if self.rank is None else {"rank": self.rank}
        line = json.dumps({"event": event, "at": round(time.time(), 3), **who, **_plain(facts)}, allow_nan=False)
        try:
            with self._lock:
                write_all(self._file, f"{line}\n".encode())
        except OSError as error:
            note_lost("standard output", error.strerror or str(error))


def emit_end(events: Events | None, ending: JobEnd) -> None:
    """Tells how a job of local ranks ended, where it did not end well and events are wanted."""
    if events is None or not ending.exit_code:
        return
    failure = ending.failure
    names = ("rank", "host", "epoch", "step", "phase", "cause", "checkpoint")
    facts = {name: getattr(failure, name) for name in names} if failure is not None else {}
    emit_failure(events, ending.exit_code, ending.text, **facts)


def emit_failure(events: Events, exit_code: int, text: str, **facts: Any) -> None:
    """Tells that all is over, as "stopped" (on request; start it again) or as "failed"."""
    events.tell("stopped" if exit_code == EXIT_STOPPED else "failed", exit_code=exit_code, text=text, **facts)


def _plain(value: Any) -> Any:
    """Returns a value in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
