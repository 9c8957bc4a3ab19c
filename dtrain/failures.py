"""A failure in words: short for what dtrain refuses, with its own traceback for what the user's code raises."""

from __future__ import annotations

import traceback
from pathlib import Path

from dtrain.errors import EXIT_FAILED, DtrainError

_PACKAGE = Path(__file__).resolve().parent
_RECIPES = _PACKAGE / "recipes"


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the text that a person shall read of a failure, and its exit code.

    Of the user's own exception the traceback is kept, without the frames of dtrain that led to it.
    """
    notes = "".join(f"\n  at {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, DtrainError):
        return f"dtrain: error: {error}{notes}", error.exit_code
    told = traceback.TracebackException.from_exception(error)
    frames_left = _fold(told)
    if not frames_left and isinstance(error, OSError):
        return f"dtrain: error: {error}{notes}", EXIT_FAILED
    if not frames_left:
        told = traceback.TracebackException.from_exception(error)
    text = "".join(told.format()).rstrip("\n")
    if getattr(told, "__notes__", None) is None:  # Python 3.10 does not print notes
        text += notes
    origin = "raised by your code" if frames_left else "this is a fault of dtrain's own; please report it"
    return f"{text}\ndtrain: error: {type(error).__name__}, {origin}, {_places(error)}".rstrip(", "), EXIT_FAILED


def _places(error: BaseException) -> str:
    return "; ".join(f"at {note}" for note in getattr(error, "__notes__", []))


def _fold(told: traceback.TracebackException) -> bool:
    """Takes dtrain's frames out of a traceback and of those chained to it; tells whether others are left."""
    for chained in (told.__cause__, told.__context__):
        if chained is not None:
            _fold(chained)
    told.stack[:] = [frame for frame in told.stack if not _is_ours(frame.filename)]
    return bool(told.stack)


def _is_ours(filename: str) -> bool:
    if filename.startswith("<frozen"):
        return True
    path = Path(filename).resolve()
    return path.is_relative_to(_PACKAGE) and not path.is_relative_to(_RECIPES)
