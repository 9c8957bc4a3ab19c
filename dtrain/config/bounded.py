"""YAML with bounds: on its size, its depth, and what its aliases come to when each stands for what it names.

A file of a hundred bytes can stand for gigabytes (nested aliases), or for itself, and one of a megabyte for a depth
that no reader stands. All of that is found in the parser's events, before anything is made of them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_BYTES = 1 << 20
MOST_DEPTH = 64
MOST_NODES = 100_000  # keys, values and items, aliases counted as what they stand for
MOST_DIGITS = (
    1_000  # of a number; YAML 1.1 has some in base 60 (1:30:00), whose reading takes the square of their length
)
_NUMBER = re.compile(r"[-+]?[\d_:.]+")
_SHORT = 2 * MOST_DEPTH  # characters of a text that cannot be too deep

# What constructors of PyYAML raise besides YAMLError, of a value such as `!!timestamp x` or 5,000 digits.
VALUE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)

_QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast


class LimitError(yaml.MarkedYAMLError):
    """A text is larger, deeper, or stands for more than is read."""


def check_bounds(text: str) -> None:
    """Compares a text with the bounds. What is no YAML is left to the loader to tell.

    Raises:
        LimitError: it is out of bounds; it has the line.
    """
    if len(text) > MOST_BYTES:
        raise LimitError(problem=f"it is longer than {MOST_BYTES:,} characters")
    if len(text) <= _SHORT and "*" not in text:
        return
    try:
        _check_events(text, _QUICK)
    except LimitError:
        raise
    except yaml.YAMLError:
        if _QUICK is not yaml.SafeLoader:  # the loader that comes next may differ in what it takes
            _check_slowly(text)


def load_plain(text: str) -> Any:
    """Returns what a text holds, in YAML's own kinds, with dates and YAML 1.1's words.

    Raises:
        ValueError: it is no YAML, or out of bounds; the message has the line where it is known.
    """
    try:
        check_bounds(text)
        return yaml.load(text, _QUICK)  # noqa: S506 - both are safe loaders
    except yaml.YAMLError as error:
        raise ValueError(words_of(error)) from None
    except VALUE_ERRORS as error:
        raise ValueError(f"a value cannot be read ({problem_of(error)})") from None


def problem_of(error: BaseException) -> str:
    """Returns what is wrong with a value, in words."""
    if isinstance(error, yaml.YAMLError):
        return getattr(error, "problem", None) or str(error)
    return str(error) if isinstance(error, ValueError) else "it does not match its tag"


def words_of(error: yaml.YAMLError) -> str:
    """Returns an error as "line 3: what is wrong"."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    at = "" if mark is None else f"line {mark.line + 1}: "
    return f"{at}{problem or str(error).partition(chr(10))[0]}"


def _check_slowly(text: str) -> None:
    try:
        _check_events(text, yaml.SafeLoader)
    except LimitError:
        raise
    except (yaml.YAMLError, *VALUE_ERRORS):
        return


def _check_events(text: str, loader: Any) -> None:
    counting = _Counting()
    for event in yaml.parse(text, Loader=loader):
        counting.add(event)


class _Counting:
    """What a text's events come to."""

    def __init__(self) -> None:
        self._sizes: dict[str, int | None] = {}  # of what an anchor names; None as long as it is not at its end
        self._open: list[tuple[str | None, int]] = []  # the collections that have begun: anchor, and nodes so far

    def add(self, event: Any) -> None:
        """Takes the next event.

        Raises:
            LimitError: it is out of bounds.
        """
        if isinstance(event, yaml.CollectionStartEvent):
            self._begin(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = self._open.pop()
            self._name(anchor, size)
            self._count(event, size)
        elif isinstance(event, yaml.AliasEvent):
            named = self._sizes.get(str(event.anchor), 1)
            if named is None:
                raise _error(event, f"*{event.anchor} refers to itself")
            self._count(event, named)
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MOST_DIGITS and event.implicit[0] and _NUMBER.fullmatch(event.value):
                raise _error(event, f"a number has more than {MOST_DIGITS:,} digits")
            self._name(event.anchor, 1)
            self._count(event, 1)

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        self._open.append((event.anchor, 1))
        self._name(event.anchor, None)
        if len(self._open) > MOST_DEPTH:
            raise _error(event, f"it is nested more than {MOST_DEPTH} levels deep")

    def _name(self, anchor: str | None, size: int | None) -> None:
        if anchor:
            self._sizes[anchor] = size

    def _count(self, event: yaml.Event, size: int) -> None:
        if not self._open:
            return
        anchor, so_far = self._open[-1]
        self._open[-1] = anchor, so_far + size
        if so_far + size > MOST_NODES:
            raise _error(event, f"it expands to more than {MOST_NODES:,} values")


def _error(event: Any, problem: str) -> LimitError:
    return LimitError(problem=problem, problem_mark=event.start_mark)
