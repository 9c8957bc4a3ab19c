"""What can go wrong, as a tree; and the exit codes.

::

    DtrainError                  exit code 1
    ├── UsageError               exit code 2: asked for something that cannot be
    │   ├── ConfigError          a key or a value of the config
    │   ├── RecipeError          the user's file: missing, unreadable, incomplete
    │   └── WorldError           the ranks that came up are not the ones asked for
    ├── CheckpointError          a checkpoint that cannot be written, or is damaged
    ├── DataError                a loader that yields nothing
    ├── StepError                a step that breaks the step contract
    ├── NotFiniteError           a loss that is NaN or infinite
    ├── RankError                a rank that a notebook's call started failed
    ├── SlurmError               one of SLURM's own commands failed, or its answer makes no sense
    ├── StopRequested            exit code 75: asked to stop; what is needed to go on is saved
    └── AgreedError            a failure that every rank knows of; rank 0 speaks

An exception of the user's own code is never wrapped: it keeps its type and its
traceback and gets a note that says where it happened (`add_place`).
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_NOTE = "dtrain: "
_LONGEST_MESSAGE, _LONGEST_NAME = 10_000, 200  # characters

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # on request, with a checkpoint: start it again and it goes on
EXIT_HANG = 76  # a hang was found and ended
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class DtrainError(Exception):
    """Base of all errors that dtrain raises itself. Its message is for people.

    Attributes:
        exit_code: what a process that ends of it exits with.
        on_all_ranks: whether every rank raises it together, so that rank 0 alone shall speak.
    """

    exit_code = EXIT_FAILED
    on_all_ranks = False

    def __init__(self, *args: object, on_all_ranks: bool | None = None) -> None:
        super().__init__(*args)
        if on_all_ranks is not None:
            self.on_all_ranks = on_all_ranks


class UsageError(DtrainError):
    """Something was asked for that cannot be done."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A key or a value of the config is wrong."""


class RecipeError(UsageError):
    """The recipe file is missing, cannot be read, or lacks something."""


class WorldError(UsageError):
    """The ranks that came up are not the ones that were asked for."""


class CheckpointError(DtrainError):
    """A checkpoint cannot be written, or is not as it was written."""


class DataError(DtrainError):
    """A loader yields nothing, or nothing that can be counted."""


class StepError(DtrainError):
    """A train or valid step breaks the step contract."""


class NotFiniteError(DtrainError):
    """A loss is NaN or infinite, and `train.nan` says stop."""


class RankError(DtrainError):
    """A rank that a call with `num_processes` started failed; the message has its report."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the rank's report, with the user's lines, and not how dtrain came to raise it here."""
        return [f"{type(self).__name__}: {self}"]


class SlurmError(DtrainError):
    """One of SLURM's own commands failed, or answered what cannot be made sense of."""


class StopRequested(DtrainError):  # noqa: N818 - no error: somebody asked for it
    """Training was asked to stop, and did so after one and the same step on every rank."""

    exit_code = EXIT_STOPPED
    on_all_ranks = True

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: where the run stands and how it goes on, and not how dtrain came to raise it here."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Failure:
    """One rank's failure in words, in a form that travels between ranks."""

    rank: int
    text: str
    exit_code: int
    kind: str


class AgreedError(DtrainError):
    """At least one rank failed and every rank knows it. Rank 0 prints it once."""

    def __init__(self, failures: list[Failure]) -> None:
        self.failures = failures
        self.exit_code = failures[0].exit_code
        super().__init__(_merge(failures), on_all_ranks=True)


def _merge(failures: list[Failure]) -> str:
    """Joins failures, equal texts once; ranks are named only where they differ."""
    by_text: dict[str, list[int]] = {}
    for failure in failures:
        by_text.setdefault(failure.text, []).append(failure.rank)
    if len(by_text) == 1 and failures[0].rank == 0:
        return failures[0].text
    return "\n".join(f"on rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())


def add_place(error: BaseException, place: object) -> None:
    """Notes on an exception where it happened, once; Python 3.11 and later print the note.

    Args:
        error: the exception; it is changed in place.
        place: what is "rank 1, epoch 2, train step 7" as a string. It is made into one here, since that takes memory,
            of which there is none left before `make_room` where this is a MemoryError.
    """
    make_room(error)
    if place_of(error) is not None:
        return
    _add_note(error, f"at {place}")


_reserve: list[bytearray] = []  # address space alone, until somebody writes to it


def keep_reserve() -> None:
    """Sets some memory aside, so that there is enough to tell of it when there is none left."""
    _reserve[:] = [bytearray(8 << 20)]


def make_room(error: BaseException) -> None:
    """Gives back the reserve, and what the failed calls hold, where memory has run out.

    Most of it may be held by the calls of the first error of several: whatever was tried after it failed in turn.
    """
    if ran_out_of_memory(error):
        _reserve.clear()
        first: BaseException | None = error
        while isinstance(first, BaseException) and ran_out_of_memory(first):
            traceback.clear_frames(first.__traceback__)
            first = first.__context__


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left, on this machine or on a device."""
    kind = type(error)  # isinstance() would ask the exception itself, which may be of the user's own kind
    if issubclass(kind, MemoryError) or name_of_type(error) == "OutOfMemoryError":
        return True
    text = text_of(error) if issubclass(kind, RuntimeError) else ""
    return "can't allocate memory" in text or "bad_alloc" in text


def add_remark(error: BaseException, remark: str) -> None:
    """Notes on an exception one more line for a person, such as "last checkpoint: ..."."""
    _add_note(error, remark)


def _add_note(error: BaseException, text: str) -> None:
    # An exception class may refuse new attributes (a frozen dataclass does); add_note() needs Python 3.11.
    object.__setattr__(error, "__notes__", [*raw_notes(error), f"{_NOTE}{text}"])


def raw_notes(error: BaseException) -> list[Any]:
    """Returns an exception's notes; none where `__notes__` is anything but a list, since any code may set it."""
    try:
        notes = getattr(error, "__notes__", None)
    except Exception:  # noqa: BLE001 - the class may be the user's own
        return []
    return list(notes) if isinstance(notes, (list, tuple)) else []


def text_of(error: BaseException, most: int = _LONGEST_MESSAGE) -> str:
    """Returns an exception's message, cut to so many characters; its class may be the user's own, and raise."""
    try:
        return cut(str(error), most)
    except BaseException as raised:  # noqa: BLE001 - what ended the run is told, not this
        return f"<its __str__ raised {name_of_type(raised)}>"


def name_of_type(error: BaseException) -> str:
    """Returns the name of an exception's class."""
    return cut(type.__getattribute__(type(error), "__name__"), _LONGEST_NAME)


def cut(text: str, most: int) -> str:
    """Returns a text, without its middle where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    return f"{text[:head]}\n... {len(text) - head - tail} characters omitted ...\n{text[len(text) - tail :]}"


def notes_of(error: BaseException) -> list[str]:
    """Returns what `add_place` and `add_remark` noted on an exception: "at rank 0, ...", then the remarks."""
    notes = [note for note in raw_notes(error) if isinstance(note, str)]
    return [note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)]


def place_of(error: BaseException) -> str | None:
    """Returns the place that `add_place` noted on an exception."""
    found = [note for note in notes_of(error) if note.startswith("at ")]
    return found[0].removeprefix("at ") if found else None


def nearest(word: str, names: Iterable[str]) -> str:
    """Returns " Did you mean 'X'?" for the name nearest to a word, or nothing."""
    match = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def nothing_yielded(split: str) -> str:
    """The message for a loader without a batch."""
    return f"the {split} loader yielded no batch. Is its dataset empty, or smaller than one batch with drop_last=True?"
