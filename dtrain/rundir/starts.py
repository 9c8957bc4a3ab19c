"""When a run was started, where and with what, and how each start ended: `starts.jsonl` in its folder.

An object a line, appended by rank 0: one as training begins, one as it ends. A start without an end was killed, or is
still going. There is nothing in it of the environment's variables, of command lines or of users.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dtrain import __version__
from dtrain.errors import StopRequested, name_of_type, text_of
from dtrain.files import append_line, identity_of, open_below, read_below
from dtrain.layout import STARTS
from dtrain.masking import redacted

logger = logging.getLogger(__name__)

Why = Literal["complete", "stopped", "failed"]
_PACKAGES = ("torch", "accelerate")
_LONGEST_TEXT = 500
MOST_COUNTED = 1 << 53


@dataclass(frozen=True)
class RunStart:
    """One time that a run was started.

    Attributes:
        at: when, in seconds since the epoch.
        facts: what is known of it: host, pid, ranks, device, job, checkpoint, epoch (the last whole one before),
            versions, gpu, cores, code.
        ended: when it ended, in seconds since the epoch; None where it was killed, or is still going.
        why: complete, stopped or failed; empty where it was killed, or is still going.
        epoch: the last whole epoch as it ended; None where that is not known.
        text: how it ended, in a line.
    """

    at: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    ended: float | None = None
    why: str = ""
    epoch: int | None = None
    text: str = ""

    @property
    def before(self) -> int:
        """The last whole epoch before it; 0 for a run that began."""
        return count_of(self.facts.get("epoch")) or 0


@contextlib.contextmanager
def noted(folder: Path, facts: Mapping[str, Any], epoch: Callable[[], int]) -> Iterator[None]:
    """Notes a start of a run, and how it ended. Rank 0 alone; a disk that takes no more never ends the run.

    Args:
        folder: the run's.
        facts: what `here` returned, and more.
        epoch: returns the last whole epoch.
    """
    folder = folder.absolute()  # a step may change the working directory
    mine = identity_of(folder)
    _note(folder, {"event": "start", "at": time.time(), **facts, "epoch": epoch()})

    def end(why: Why, text: str = "") -> None:
        line = next(iter(text.splitlines()), "")[:_LONGEST_TEXT]
        line = redacted(line)
        if identity_of(folder) == mine:  # what was put in the place of a folder that was moved is not this run's
            _note(folder, {"event": "end", "at": time.time(), "why": why, "epoch": epoch(), "text": line})

    try:
        yield
    except StopRequested as request:
        end("stopped", str(request))
        raise
    except BaseException as error:
        end("failed", f"{name_of_type(error)}: {text_of(error)}")
        raise
    end("complete")


def here(code: Path) -> dict[str, Any]:
    """Returns what this process and its machine are.

    Args:
        code: the folder of the user's code, whose commit is looked up.
    """
    versions = {"dtrain": __version__, **{name: _version(name) for name in _PACKAGES}}
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "versions": {**versions, "python": platform.python_version()},
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "code": commit_of(code),
    }


def commit_of(folder: Path) -> str | None:
    """Returns the commit that is checked out where a folder lies; None where that is no git repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read_starts(folder: Path) -> list[RunStart]:
    """Returns the starts of a run, the first one first; lines that are torn or foreign are left out."""
    return parse_starts(folder)[0]


def parse_starts(folder: Path) -> tuple[list[RunStart], str]:
    """Returns the starts of a run, and why its file cannot be read; empty where it can, or where there is none."""
    found: list[RunStart] = []
    events, fault = _events(folder)
    for event in events:
        if event.get("event") == "start":
            found.append(RunStart(event["at"], {k: v for k, v in event.items() if k not in ("event", "at")}))
        elif event.get("event") == "end" and found and found[-1].ended is None:
            found[-1] = RunStart(
                found[-1].at,
                found[-1].facts,
                event["at"],
                str(event.get("why", "")),
                count_of(event.get("epoch")),
                str(event.get("text", "")),
            )
    return found, fault


def _events(folder: Path) -> tuple[list[dict[str, Any]], str]:
    try:
        text = read_below(folder, STARTS).decode("utf-8", "replace")
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], error.strerror or "cannot be read"
    found: list[dict[str, Any]] = []
    fault = ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            event = json.loads(line)
        except ValueError:  # torn, or foreign
            continue
        except RecursionError:
            fault = f"line {number} is nested too deeply"
            continue
        if isinstance(event, dict) and _is_time(event.get("at")):
            found.append(event)
    return found, fault


def count_of(value: Any) -> int | None:
    """Returns a value that is a count of epochs or the like; None where it is none, whatever a file holds."""
    return value if type(value) is int and 0 <= value < MOST_COUNTED else None


def _is_time(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _note(folder: Path, event: Mapping[str, Any]) -> None:
    """Appends a line by one write; where the last one is torn, on a line of its own."""
    path = folder / STARTS
    try:
        descriptor = open_below(folder, STARTS, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            append_line(descriptor, json.dumps(event).encode() + b"\n", path, sync=True)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.warning("%s: a line could not be written: %s", path, error.strerror)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
