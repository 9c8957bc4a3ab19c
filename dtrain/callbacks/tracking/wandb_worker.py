"""Sends a run's values to W&B in a process of its own, which `dtrain.callbacks.tracking.wandb_tracker` starts.

The training writes its values to the run's folder and never waits for a network; this process reads them there. It
hears on its standard input how the run ended, or, by the end of that pipe alone, that it was killed; and tells on its
standard output, an object a line, how it fares: up, online, offline, failed, waits, done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.callbacks.tracking.files import ABOUT, read_json
from dtrain.callbacks.tracking.media_notes import MediaIndex
from dtrain.callbacks.tracking.values import Values
from dtrain.callbacks.tracking.wandb_run import NotSentError, WandbRun, server
from dtrain.files import open_below
from dtrain.layout import TRACKING

LOCK = "wandb.lock"
_POLL_SECONDS = 0.5
_AGAIN_SECONDS = 300.0  # after which a server that could not be used is asked again
_LOCK_SECONDS = 30.0
_KILLED_SECONDS = 20.0  # less than that: what is not sent by then is sent by the run that goes on


class Line:
    """The two pipes to the training. What is started here, as W&B's own service, does not get hold of them.

    Attributes:
        end: what the training said at its end; empty where it was killed; None as long as it goes on.
    """

    def __init__(self) -> None:
        self.end: dict[str, Any] | None = None
        self._read = b""
        self._in, self._out = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

    def tell(self, event: str, **more: Any) -> None:
        """Tells the training how it fares; which may be gone."""
        with contextlib.suppress(OSError):
            os.write(self._out, (json.dumps({"event": event, **more}) + "\n").encode())

    def wait(self, seconds: float) -> bool:
        """Waits for the end, some seconds at most; returns whether it has come."""
        if self.end is None and select.select([self._in], [], [], seconds)[0]:
            data = os.read(self._in, 65536)
            self._read += data
            if not data:
                self.end = {}
            elif self._read.endswith(b"\n"):
                self.end = json.loads(self._read)
        return self.end is not None


@contextlib.contextmanager
def alone(run: Path, seconds: float = _LOCK_SECONDS, name: str = LOCK) -> Iterator[bool]:
    """Keeps others from sending the same run meanwhile; yields whether that was so within some seconds.

    A file system without locks lets everybody in.
    """
    until = time.monotonic() + seconds
    with os.fdopen(open_below(run, f"{TRACKING}/{name}", os.O_RDWR | os.O_CREAT), "r+b") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    yield False
                    return
                time.sleep(0.1)
                continue
            except OSError:
                pass
            yield True
            return


class Sender:
    """Follows a run; sends its values as they come, or keeps them until a server can be used.

    Args:
        run: the run's folder.
        watched: the training's process.
        line: to the training.
    """

    def __init__(self, run: Path, watched: int, line: Line) -> None:
        self._folder, self._watched, self._line = run, watched, line
        self._options: Mapping[str, Any] = read_json(run / TRACKING / ABOUT)["wandb"]
        self._wants_online = self._options["mode"] == "online"
        self._asked = time.monotonic()
        why = ""
        if self._wants_online:
            url, why = server()
            why = why or self._go_online(url)
        if why or not self._wants_online:
            self._open(online=False)
            line.tell("offline", why=why)

    def _open(self, *, online: bool) -> None:
        patience = self._options["wait_seconds"]
        self._run = WandbRun(self._folder, online=online, patience=patience, watched=self._watched)
        self.online = online
        self._media = MediaIndex(self._folder)
        self._values = Values(self._folder)  # from the start: what W&B has it leaves out itself

    def _go_online(self, url: str) -> str:
        """Returns why it cannot; "" where it could."""
        try:
            self._open(online=True)
        except NotSentError as error:
            return f"{url}: {error}"
        self._line.tell("online", url=self._run.url)
        return ""

    def send(self) -> None:
        """Sends what has come."""
        values = self._values.news()
        self._run.send(values, self._media.news())  # read after them, so that none comes later than its values
        if self._wants_online and not self.online and time.monotonic() - self._asked > _AGAIN_SECONDS:
            self._ask_again()

    def _ask_again(self) -> None:
        self._asked = time.monotonic()
        url, why = server()
        if not why:
            self._run.finish(self._values, {"failed": False})  # one at a time
            if self._go_online(url):
                self._open(online=False)

    def finish(self, end: Mapping[str, Any]) -> str:
        """Sends what is left; returns why that could not be done, "" where it could."""
        values = self._values.news(everything=bool(end))
        self._run.send(values, self._media.news())
        if not end:  # it was killed; the next one that goes on with it may be waiting
            threading.Timer(_KILLED_SECONDS, os._exit, (1,)).start()
        try:
            self._run.finish(self._values, end)
        except NotSentError as error:
            return str(error)
        return ""


def follow(run: Path, watched: int, line: Line) -> None:
    """Follows a run to its end."""
    import wandb  # noqa: F401 - which takes a second; from here on it is the server that one waits for

    line.tell("up")
    with alone(run) as is_alone:
        if not is_alone:
            line.tell("failed", why="another process is sending this run")
            return
        sender = Sender(run, watched, line)
        while not line.wait(_POLL_SECONDS):
            sender.send()
        why = sender.finish(line.end or {})
    line.tell("done", sent=sender.online and not why, why=why)


def main() -> None:
    """Detaches itself, and follows the run whose folder is the only argument."""
    watched = os.getppid()
    if os.fork():  # no child of the rank's: what it does is no sign of life of that one
        os._exit(0)
    line = Line()
    try:
        follow(Path(sys.argv[1]), watched, line)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no matter of the training's
        import traceback

        traceback.print_exc()
        line.tell("failed", why=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    sys.stderr.flush()
    os._exit(0)  # without W&B's own exit functions, which might wait for a server
