"""A failure is told whatever kind of exception it is: its class is the user's own, and may do anything."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import UsageError, add_place, cut
from dtrain.launch.monitor.describe import Description, explain

MOST = 60_000  # characters of what is told in all


def raised(make: Callable[[], BaseException], cause: BaseException | None = None) -> BaseException:
    """What comes of raising it, in the user's code, within dtrain's own context managers."""

    @contextmanager
    def around() -> Any:
        yield

    try:
        with around():
            error = make()
            if cause is not None:
                error.__cause__ = cause
            raise error
    except BaseException as found:  # noqa: BLE001 - of every kind
        return found


class Wordless(Exception):  # noqa: N818 - as users name theirs
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Leaving(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class Closed(Exception):  # noqa: N818
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):  # noqa: N818
    code: int


class Odd(type):
    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(name)


class OfOddKind(Exception, metaclass=Odd):  # noqa: N818
    pass


class Secretive(Exception):  # noqa: N818
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class Base(BaseException):
    pass


class Text(str):
    def __str__(self) -> str:
        raise RuntimeError("text")


def noted(notes: object) -> BaseException:
    error = ValueError("noted")
    error.__notes__ = notes  # type: ignore[assignment, unused-ignore]
    return error


def chained(links: int, *, by_context: bool = False) -> BaseException:
    last: BaseException | None = None
    for number in range(links):
        error = ValueError(f"link {number}")
        if by_context:
            error.__context__ = last
        else:
            error.__cause__ = last
        last = error
    return last or ValueError()


def looped() -> BaseException:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    return one


KINDS: dict[str, tuple[Callable[[], BaseException], str, str]] = {
    "of no Exception": (lambda: Base("mine"), "Base", "mine"),
    "GeneratorExit": (lambda: GeneratorExit("mine"), "GeneratorExit", "mine"),
    "KeyboardInterrupt": (lambda: KeyboardInterrupt("mine"), "KeyboardInterrupt", "mine"),
    "str raises": (Wordless, "Wordless", "__str__ raised RuntimeError"),
    "str leaves": (Leaving, "Leaving", "__str__ raised SystemExit"),
    "takes no attributes": (lambda: Closed("mine"), "Closed", "mine"),
    "frozen": (lambda: Frozen(7), "Frozen", "7"),
    "metaclass": (lambda: OfOddKind("mine"), "OfOddKind", "mine"),
    "tells nothing": (lambda: Secretive("mine"), "Secretive", "mine"),
    "notes are a number": (lambda: noted(5), "ValueError", "noted"),
    "notes are no text": (lambda: noted([1, None, "a note"]), "ValueError", "noted"),
    "notes without end": (lambda: noted(["x" * 1000] * 10_000), "ValueError", "noted"),
    "chain": (lambda: chained(3000), "ValueError", "link 2999"),
    "chain of contexts": (lambda: chained(3000, by_context=True), "ValueError", "link 2999"),
    "loop": (looped, "ValueError", "one"),
    "long": (lambda: ValueError("x" * 30_000_000), "ValueError", "x" * 100),
    "many lines": (lambda: ValueError("line\n" * 100_000), "ValueError", "line"),
    "bytes": (lambda: ValueError(b"\xff\0\xfe"), "ValueError", "xff"),
    "surrogates": (lambda: ValueError("\udcff\ud800\0\x1b[31m"), "ValueError", "\udcff"),
    "text of its own": (lambda: ValueError(Text("a")), "ValueError", "__str__ raised RuntimeError"),
    "long name": (lambda: type("N" * 10_000, (Exception,), {})("mine"), "N" * 100, "mine"),
    "of dtrain, long": (lambda: UsageError("x" * 1_000_000), "UsageError", "x"),
}


def check(found: Description, kind: str, message: str) -> None:
    assert found.told.type.startswith(kind)
    assert message in found.told.message
    assert len(found.text) + len(found.told.message) + len(found.told.traceback) < MOST
    json.dumps(dataclasses.asdict(found.told)).encode()


@pytest.mark.parametrize("name", KINDS)
def test_a_failure_is_told_by_its_kind_its_message_and_the_users_line(name: str) -> None:
    make, kind, message = KINDS[name]
    error = raised(make)
    add_place(error, "rank 1, epoch 2, train step 7")
    found = explain(error)
    check(found, kind, message)
    assert "rank 1, epoch 2, train step 7" in found.text or name == "tells nothing"
    if kind != "UsageError":
        assert "raised by your code" in found.text
        assert __file__ in found.told.traceback
    assert explain(error) == found, "to describe it does not change it"
    inner = raised(lambda: ValueError("outer"), cause=error)
    check(explain(inner), "ValueError", "outer")


def test_of_a_long_chain_both_ends_are_shown() -> None:
    text = explain(raised(lambda: chained(3000))).text
    assert all(f"link {number}\n" in text for number in (0, 9, 2990, 2999))
    assert "link 1500" not in text
    assert "(2980 exceptions in between omitted)" in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups")
def test_groups_may_be_deep() -> None:
    def deep() -> BaseException:
        error: Exception = ValueError("inmost")
        for _ in range(2000):
            error = ExceptionGroup("group", [error])  # noqa: F821 - of Python 3.11
        return error

    check(explain(raised(deep)), "ExceptionGroup", "group")


def test_what_is_cut_keeps_its_ends() -> None:
    assert cut("abc", 3) == "abc"
    text = cut("".join(f"{number} " for number in range(10_000)), 300)
    assert text.startswith("0 1 2 ") and text.endswith("9998 9999 ")
    assert " characters omitted ...\n" in text
    assert len(text) < 350


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.tuples(inner, inner), max_leaves=20), st.text())
def test_any_arguments(argument: object, note: str) -> None:
    error = raised(lambda: ValueError(argument))
    add_place(error, note)
    found = explain(error)
    check(found, "ValueError", "")
    assert "raised by your code" in found.text
