"""A failure in words: short for what dtrain refuses, with its own traceback for what the user's code raises."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import (
    EXIT_FAILED,
    DtrainError,
    NotFiniteError,
    StopRequested,
    cut,
    make_room,
    name_of_type,
    notes_of,
    ran_out_of_memory,
    text_of,
)
from dtrain.launch.monitor.exit_report import PEER, ExceptionInfo
from dtrain.launch.monitor.hints import hint_of
from dtrain.launch.monitor.remedies import remedy_of
from dtrain.masking import redacted
from dtrain.version import PACKAGE, RECIPES

_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}


_SITES = {"site-packages", "dist-packages"}  # also of another environment that this one sees
_LONGEST_TEXT = 40_000  # characters of what is told of one failure
_MOST_LINKS = 10  # at each end of a chain of exceptions
_MOST_LINES = 20
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
    told: ExceptionInfo


@contextlib.contextmanager
def skip_installed(error: BaseException) -> Iterator[None]:
    """While inside, an exception's traceback begins with the first frame that is the user's own."""
    whole = first = error.__traceback__
    while first is not None and _is_installed(first.tb_frame.f_code.co_filename):
        first = first.tb_next
    error.__traceback__ = first or whole
    try:
        yield
    finally:
        error.__traceback__ = whole


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the text that a person shall read of a failure, and its exit code; see `explain`."""
    found = explain(error)
    return found.text, found.exit_code


def explain(error: BaseException) -> Description:
    """Describes a failure.

    Of the user's own exception the traceback is kept, without the frames of dtrain that led to it; those of torch and
    Accelerate are counted in one line. The exception's class may be the user's own and do anything when it is asked
    for its words; what is very long is cut.
    """
    try:
        return _explained(error)
    except BaseException as raised:  # noqa: BLE001 - the failure that is to be told is another one
        return _briefly(error, raised)


def _explained(error: BaseException) -> Description:
    first, error = error, _refused(error)
    shortages = _shortages(error)
    for one in shortages:
        make_room(one)
    at = _noted(*shortages, first) + (remedy_of(text_of(first)) or hint_of(text_of(first)))
    error = next((one for one in reversed(shortages) if users_line(one)), error)
    if isinstance(error, StopRequested):
        return _described(error, f"dtrain: {text_of(error, _LONGEST_TEXT)}", error.exit_code)
    if isinstance(error, DtrainError):
        return _described(error, f"dtrain: error: {text_of(error, _LONGEST_TEXT)}{at}", error.exit_code)
    if isinstance(error, SystemExit):
        code = cut(repr(error.code), _LONGEST_TEXT)
        return _described(error, f"dtrain: error: your code called sys.exit({code}){at}", EXIT_FAILED)
    if isinstance(error, ModuleNotFoundError):
        who, missing = _not_installed(error)
        if who == "dtrain":
            return _described(error, f"dtrain: error: {missing}", EXIT_FAILED)
        at += f"\n  hint: {missing}" if missing else ""
    told = _traced(error)
    if len(shortages) > 1:
        told.__context__ = None
    files = _fold(told)
    if not files and isinstance(error, OSError):
        return _described(error, f"dtrain: error: {text_of(error)}{at}", EXIT_FAILED)
    if not files:
        told = _traced(error)
    text = cut(_CPP_FRAMES.sub("", "".join(told.format())).rstrip("\n"), _LONGEST_TEXT)
    whole = f"{text}\ndtrain: error: {name_of_type(error)}, raised {_origin(files)}{at}"
    return _described(error, whole, EXIT_FAILED, text)


def _not_installed(error: ModuleNotFoundError) -> tuple[str, str]:
    """Returns who needs the package that is missing, and that in words; nothing where it is another package's."""
    name = (error.name or "").partition(".")[0]
    frames = traceback.walk_tb(BaseException.__getattribute__(error, "__traceback__"))
    files = [frame.f_code.co_filename for frame, _ in frames]
    importer = next((file for file in reversed(files) if not file.startswith("<frozen")), "")
    if not name or name in sys.stdlib_module_names or (_is_installed(importer) and not _is_ours(importer)):
        return "", ""
    who = "dtrain" if _is_ours(importer) else "your code"
    return who, f"{who} needs {name}, which is not installed: {sys.executable} -m pip install {name}"


def _briefly(error: BaseException, raised: BaseException) -> Description:
    """Describes a failure by its class and its lines alone, where the exception itself cannot be shown."""
    kind = name_of_type(error)
    lines = _users_lines(error)
    text = "\n".join([*(f"  {line}" for line in lines[-_MOST_LINES:]), f"{kind}: {text_of(error)}"])
    why = f"It could not be shown in full: that raised {name_of_type(raised)}."
    whole = (
        f"{text}\ndtrain: error: {kind}, raised {'by your code' if lines else 'within dtrain'}. {why}{_noted(error)}"
    )
    return Description(whole, EXIT_FAILED, ExceptionInfo("exception", kind, text_of(error), text))


def _noted(*errors: BaseException) -> str:
    """Returns the lines that were noted on the first of some exceptions that has any."""
    notes: list[str] = next((held for one in errors if (held := notes_of(one))), [])
    return "".join(f"\n  {note}" for note in notes)


def _traced(error: BaseException) -> traceback.TracebackException:
    """Returns an exception's traceback, with no more of a long chain of causes than its two ends."""
    told = traceback.TracebackException.from_exception(error)
    chain = [told]
    while (link := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(link)
    for one in chain:
        _shorten(one)
    if len(chain) > 2 * _MOST_LINKS:
        upper, lower = chain[_MOST_LINKS - 1], chain[-_MOST_LINKS]
        left_out = len(chain) - 2 * _MOST_LINKS
        upper.__cause__, upper.__context__ = lower, None
        vars(lower)["__notes__"] = [*vars(lower)["__notes__"], f"({left_out} exceptions in between omitted)"]
    return told


def _shorten(told: traceback.TracebackException) -> None:
    """Cuts the message and the notes of a formatted exception, and drops notes that are none."""
    held = vars(told)
    if isinstance(held.get("_str"), str):
        held["_str"] = cut(held["_str"], _LONGEST_TEXT // 4)
    notes = held.get("__notes__")
    kept = [cut(note, _LONGEST_TEXT // 8) for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    held["__notes__"] = [*kept[:_MOST_LINES], f"({len(kept)} notes in all)"] if len(kept) > _MOST_LINES else kept


def _refused(error: BaseException) -> BaseException:
    """Returns the exception that was on its way where its class refused an attribute, which contextlib sets on it."""
    while isinstance(error, AttributeError) and error.__context__ is not None and "__traceback__" in text_of(error):
        error = error.__context__
    return error


def _shortages(error: BaseException) -> list[BaseException]:
    """Returns an exception and, of a MemoryError, those that it came on top of.

    Whatever is tried after the first one may fail the same way; and some have no traceback, which needs memory, too.
    """
    found = [error]
    while isinstance(found[-1], MemoryError) and isinstance(found[-1].__context__, MemoryError):
        found.append(found[-1].__context__)
    return found


def _described(error: BaseException, text: str, exit_code: int, trace: str = "") -> Description:
    message = redacted(_CPP_FRAMES.sub("", text_of(error)))
    told = ExceptionInfo(cause_of(error), name_of_type(error), message, redacted(trace))
    return Description(redacted(text), exit_code, told)


def cause_of(error: BaseException) -> str:
    """Returns one word for what an exception means: nan, exit, out_of_memory, peer or exception."""
    name = name_of_type(error)
    if isinstance(error, NotFiniteError):
        return "nan"
    if isinstance(error, SystemExit):
        return "exit"
    if ran_out_of_memory(error):
        return "out_of_memory"
    if (name in _PEER_ERRORS or isinstance(error, ConnectionError)) and _PEER_GONE.search(text_of(error)):
        return PEER
    return "exception"


def users_line(error: BaseException) -> str | None:
    """Returns "FILE:LINE" of the innermost frame of an exception's traceback that is the user's own code."""
    return next(reversed(_users_lines(error)), None)


def _users_lines(error: BaseException) -> list[str]:
    """Returns "FILE:LINE" of all of those frames, the innermost last."""
    # Not by the attribute, for which the class may have code of its own.
    frames = traceback.walk_tb(BaseException.__getattribute__(error, "__traceback__"))
    places = [(frame.f_code.co_filename, line) for frame, line in frames]
    return [f"{file}:{line}" for file, line in places if not _is_ours(file) and not _is_installed(file)]


def _origin(files: list[str]) -> str:
    """Whose fault an exception may be, from the files of its traceback that are not dtrain's."""
    if not files:
        return "by dtrain itself; this is a bug, please report it"
    if any(not _is_installed(file) for file in files):
        return "by your code"
    return f"inside {Path(files[-1]).parent.name}/{Path(files[-1]).name}, called by dtrain"


def _fold(told: traceback.TracebackException) -> list[str]:
    """Takes dtrain's frames out of a traceback and of those chained to it; returns the files that are left."""
    chained = told.__cause__ or told.__context__
    if chained is not None:  # of which there are some at most
        _fold(chained)
    kept = [frame for frame in told.stack if not _is_ours(frame.filename)]
    files = [frame.filename for frame in kept]
    if any(not _is_installed(file) for file in files):  # else those frames are all that there is to see
        told.stack = _Folded(kept)
    else:
        told.stack[:] = kept
    # Ours stand below the traceback. A new list, since the exception's own is the same one.
    vars(told)["__notes__"] = [n for n in getattr(told, "__notes__", None) or () if not n.startswith("dtrain: ")]
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
    path = _resolved(filename)
    return path.is_relative_to(PACKAGE) and not path.is_relative_to(RECIPES)


def _is_installed(filename: str) -> bool:
    """Whether a file is the standard library's or an installed package's; the bundled recipes count as the user's."""
    path = _resolved(filename)
    if path.is_relative_to(RECIPES):
        return False
    return not _SITES.isdisjoint(path.parts) or any(path.is_relative_to(root) for root in _INSTALLED)


def _resolved(filename: str) -> Path:
    try:
        return Path(filename).resolve()
    except (OSError, ValueError):  # it is no file's name ("<string>"), and the current folder is gone
        return Path(filename)
