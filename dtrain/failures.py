"""A failure in words: short for what dtrain refuses, with its own traceback for what the user's code raises."""

from __future__ import annotations

import itertools
import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import (
    EXIT_FAILED,
    DtrainError,
    NotFiniteError,
    StopRequested,
    make_room,
    notes_of,
    ran_out_of_memory,
)
from dtrain.launch.reports import PEER, Told

_PACKAGE = Path(__file__).resolve().parent
_RECIPES = _PACKAGE / "recipes"
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}


_FOLDED = ("torch", "accelerate")
# How torch words that another rank has gone; the messages are gloo's and NCCL's.
_PEER_GONE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|ncclRemoteError|remote process exited|Connection refused"
    r"|Socket Timeout|Timed out waiting|Application timeout caused pair closure|Failed to recv, got 0 bytes"
)
# The C++ frames that torch appends to some messages; whoever calls torch from Python can do nothing with them.
_CPP_FRAMES = re.compile(
    r"\n(?:Exception raised from .*\(most recent call first\):|C\+\+ CapturedTraceback:)(?:\n(?:frame )?#\d+.*)*"
)
_PEER_ERRORS = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")


@dataclass(frozen=True)
class Description:
    """A failure, for a person and for programs.

    Attributes:
        text: what a person shall read.
        exit_code: what the process ends with.
        told: the same in parts.
    """

    text: str
    exit_code: int
    told: Told


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the text that a person shall read of a failure, and its exit code; see `explain`."""
    found = explain(error)
    return found.text, found.exit_code


def explain(error: BaseException) -> Description:
    """Describes a failure.

    Of the user's own exception the traceback is kept, without the frames of dtrain that led to it; those of torch and
    Accelerate are counted in one line.
    """
    shortages = _shortages(error)
    for one in shortages:
        make_room(one)
    notes = next((found for one in shortages if (found := notes_of(one))), [])
    error = next((one for one in reversed(shortages) if users_line(one)), error)
    at = "".join(f"\n  {note}" for note in notes)
    if isinstance(error, StopRequested):
        return _described(error, f"dtrain: {error}", error.exit_code)
    if isinstance(error, DtrainError):
        return _described(error, f"dtrain: error: {error}{at}", error.exit_code)
    if isinstance(error, SystemExit):
        return _described(error, f"dtrain: error: your code called sys.exit({error.code!r}){at}", EXIT_FAILED)
    told = traceback.TracebackException.from_exception(error)
    if len(shortages) > 1:
        told.__context__ = None
    files = _fold(told)
    if not files and isinstance(error, OSError):
        return _described(error, f"dtrain: error: {error}{at}", EXIT_FAILED)
    if not files:
        told = traceback.TracebackException.from_exception(error)
    text = _CPP_FRAMES.sub("", "".join(told.format())).rstrip("\n")
    whole = f"{text}\ndtrain: error: {type(error).__name__}, raised {_origin(files)}{at}"
    return _described(error, whole, EXIT_FAILED, text)


def _shortages(error: BaseException) -> list[BaseException]:
    """Returns an exception and, of a MemoryError, those that it came on top of.

    Whatever is tried after the first one may fail the same way; and some have no traceback, which needs memory, too.
    """
    found = [error]
    while isinstance(found[-1], MemoryError) and isinstance(found[-1].__context__, MemoryError):
        found.append(found[-1].__context__)
    return found


def _described(error: BaseException, text: str, exit_code: int, trace: str = "") -> Description:
    return Description(
        text, exit_code, Told(cause_of(error), type(error).__name__, _CPP_FRAMES.sub("", str(error)), trace)
    )


def cause_of(error: BaseException) -> str:
    """Returns one word for what an exception means: nan, exit, out_of_memory, peer or exception."""
    name = type(error).__name__
    if isinstance(error, NotFiniteError):
        return "nan"
    if isinstance(error, SystemExit):
        return "exit"
    if ran_out_of_memory(error):
        return "out_of_memory"
    if (name in _PEER_ERRORS or isinstance(error, ConnectionError)) and _PEER_GONE.search(str(error)):
        return PEER
    return "exception"


def users_line(error: BaseException) -> str | None:
    """Returns "FILE:LINE" of the innermost frame of an exception's traceback that is the user's own code."""
    own = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not _is_ours(f.filename) and not _is_installed(f.filename)
    ]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _origin(files: list[str]) -> str:
    """Whose fault an exception may be, from the files of its traceback that are not dtrain's."""
    if not files:
        return "by dtrain itself; this is a fault of it, please report it"
    if any(not _is_installed(file) for file in files):
        return "by your code"
    return f"inside {Path(files[-1]).parent.name}/{Path(files[-1]).name}, called by dtrain"


def _fold(told: traceback.TracebackException) -> list[str]:
    """Takes dtrain's frames out of a traceback and of those chained to it; returns the files that are left."""
    for chained in (told.__cause__, told.__context__):
        if chained is not None:
            _fold(chained)
    kept = [frame for frame in told.stack if not _is_ours(frame.filename)]
    files = [frame.filename for frame in kept]
    if any(not _is_installed(file) for file in files):  # else those frames are all that there is to see
        told.stack = _Folded(kept)
    else:
        told.stack[:] = kept
    # Ours stand below the traceback. A new list, since the exception's own is the same one.
    vars(told)["__notes__"] = [n for n in getattr(told, "__notes__", None) or () if not str(n).startswith("dtrain: ")]
    return files


class _Folded(traceback.StackSummary):
    """A stack that prints the frames of torch and Accelerate as one line that counts them."""

    def format(self, **keywords: Any) -> list[str]:
        """Formats the frames, as the base class does."""
        lines: list[str] = []
        for package, frames in itertools.groupby(self, lambda frame: _package_of(frame.filename)):
            group = list(frames)
            if package is None:
                lines += traceback.StackSummary.from_list(group).format(**keywords)
            else:
                lines.append(f"  ... {len(group)} frame{'' if len(group) == 1 else 's'} of {package}\n")
        return lines


def _package_of(filename: str) -> str | None:
    """The package whose frames are folded that a file belongs to, or None."""
    parts = Path(filename).parts
    return next((name for name in _FOLDED if name in parts and _is_installed(filename)), None)


def _is_ours(filename: str) -> bool:
    if filename.startswith("<frozen"):
        return True
    path = Path(filename).resolve()
    return path.is_relative_to(_PACKAGE) and not path.is_relative_to(_RECIPES)


def _is_installed(filename: str) -> bool:
    """Whether a file is the standard library's or an installed package's; the bundled recipes count as the user's."""
    path = Path(filename).resolve()
    if path.is_relative_to(_RECIPES):
        return False
    return any(path.is_relative_to(root) for root in _INSTALLED)
