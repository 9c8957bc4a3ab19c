"""A failure in words: short for what dtrain refuses, with its own traceback for what the user's code raises."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from dtrain.errors import EXIT_FAILED, DtrainError, place_of

_PACKAGE = Path(__file__).resolve().parent
_RECIPES = _PACKAGE / "recipes"
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the text that a person shall read of a failure, and its exit code.

    Of the user's own exception the traceback is kept, without the frames of dtrain that led to it.
    """
    place = place_of(error)
    at = f"\n  at {place}" if place else ""
    if isinstance(error, DtrainError):
        return f"dtrain: error: {error}{at}", error.exit_code
    if isinstance(error, SystemExit):
        return f"dtrain: error: your code called sys.exit({error.code!r}){at}", EXIT_FAILED
    told = traceback.TracebackException.from_exception(error)
    files = _fold(told)
    if not files and isinstance(error, OSError):
        return f"dtrain: error: {error}{at}", EXIT_FAILED
    if not files:
        told = traceback.TracebackException.from_exception(error)
    text = "".join(told.format()).rstrip("\n")
    return f"{text}\ndtrain: error: {type(error).__name__}, raised {_origin(files)}{at}", EXIT_FAILED


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
    told.stack[:] = [frame for frame in told.stack if not _is_ours(frame.filename)]
    return [frame.filename for frame in told.stack]


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
