"""An output to which processes write that do not know of each other: lines are written whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from dtrain.launch.terminal import screen as module
from dtrain.launch.terminal.screen import Screen


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


def read(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("by_lines", [True, False])
def test_a_line_that_comes_in_pieces_is_written_in_one(
    by_lines: bool, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    ours, theirs = pipe
    screen = Screen(theirs)
    screen.by_lines = by_lines
    seen = []
    for chunk in (b"first\nsec", b"ond", b"\nthird"):
        screen.show("rank", chunk)
        seen.append(read(ours))
    assert seen == ([b"first\n", b"", b"second\n"] if by_lines else [b"first\nsec", b"ond", b"\nthird"])
    if not by_lines:
        return
    moment = screen.next_release()
    assert moment is not None
    screen.release()
    assert read(ours) == b""
    clock.now = moment  # a question, or a bar that never ends its line
    screen.release()
    assert (read(ours), screen.next_release()) == (b"third", None)
    screen.show("rank", b" goes on")
    screen.release(all_of_it=True)
    assert read(ours) == b" goes on"
