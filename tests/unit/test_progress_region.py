"""Lines at the bottom of a terminal and what is printed meanwhile, on an emulated screen."""

from __future__ import annotations

import codecs
import os
import select
import sys
import tty
from collections.abc import Callable
from typing import Any

import pytest
from helpers.screens import Screen

from dtrain.callbacks.progress.region import Region, StdoutProxy, StdoutRedirect
from dtrain.launch.terminal.rank_log import RankLog
from dtrain.launch.terminal.screen import Screen as Shared

BARS = ["bar one ━━━━━━", "bar two ━━━"]


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def region(screen: Screen) -> Region:
    return Region(screen, lambda: screen.emulator.columns)  # type: ignore[arg-type]


def above(region: Region, screen: Screen) -> StdoutProxy:
    return StdoutProxy(region, screen)  # type: ignore[arg-type]


def test_what_is_printed_stays_above_and_the_bars_below(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    assert screen.lines == ["", *BARS]
    out = above(region, screen)
    for number in range(20):  # more than the terminal has lines
        print("line", number, file=out)
        region.draw([f"{bar} {number}" for bar in BARS])
    assert screen.lines == [*(f"line {n}" for n in range(11, 20)), "", *(f"{bar} 19" for bar in BARS)]
    region.clear()
    assert screen.lines == [f"line {n}" for n in range(11, 20)]
    screen.write("$ next")
    assert screen.lines[-1] == "$ next"


def test_what_another_process_writes_stays_too(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    for number in range(3):
        screen.write(f"raw {number}\n")
        region.draw(BARS)
    assert screen.lines == ["raw 0", "raw 1", "raw 2", "", *BARS]


def test_a_bar_of_somebody_elses_is_one_line(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    out = above(region, screen)
    for percent in (10, 50, 90):
        out.write(f"\r{percent}% of it")
        out.flush()
        assert screen.lines == [f"{percent}% of it", *BARS]
        region.draw(BARS)
        assert screen.lines == [f"{percent}% of it", *BARS]
    out.write("\r100% of it\n")
    print("next", file=out)
    assert screen.lines == ["100% of it", "next", "", *BARS]


def test_returns_at_the_end_and_windows_lines(screen: Screen, region: Region) -> None:
    out = above(region, screen)
    for number in range(3):
        print("count", number, end="\r", file=out)
    assert screen.lines == ["count 2"]
    out.write("\r\nby windows\r\n")
    assert screen.lines == ["count 2", "by windows"]


def test_a_line_that_has_begun_waits_for_its_end(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    out = above(region, screen)
    out.write("half, ")
    assert screen.lines == ["", *BARS]
    out.flush()
    assert screen.lines == ["half, ".rstrip(), *BARS]
    assert (screen.emulator.cursor.y, screen.emulator.cursor.x) == (0, 6)  # where a debugger's prompt is answered
    out.write("and whole\n")
    assert screen.lines == ["half, and whole", "", *BARS]


def test_one_that_never_ends_is_not_lost(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    out = above(region, screen)
    out.write("no end")
    out.flush()
    region.clear()
    assert screen.lines == ["no end"]
    assert screen.emulator.cursor.x == 0


def test_colours_stay_and_other_control_goes(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    above(region, screen).write("\x1b[2J\x1b[5A\x1b[31mred\x1b[0m\n")
    assert screen.lines == ["red", "", *BARS]
    assert screen.emulator.buffer[0][0].fg == "red"


def test_a_long_beginning_is_cut_and_never_wraps(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    out = above(region, screen)
    out.write("x" * 100)
    out.flush()
    assert screen.lines == ["x" * 39, *BARS]
    out.write("\n")
    assert screen.lines == ["x" * 40, "x" * 40, "x" * 20, "", *BARS]


def test_after_a_resize_nothing_old_is_left(screen: Screen, region: Region) -> None:
    region.draw(["a bar that is quite long ━━━━━━━━", "another ━━━━━━━━"])
    screen.emulator.resize(12, 20)
    region.draw(["short", "bars"])
    assert screen.lines == ["", "short", "bars"]


def test_fewer_lines_than_before(screen: Screen, region: Region) -> None:
    region.draw([*BARS, "a third"])
    region.draw(BARS[:1])
    assert screen.lines == ["", BARS[0]]


def test_a_rank_that_draws_nothing_makes_way(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    other = StdoutProxy(Region(screen, own=False), screen)  # type: ignore[arg-type]
    other.write("one\ntwo\nthree\n")
    assert screen.lines == ["one", "two", "three"]
    region.draw(BARS)
    assert screen.lines == ["one", "two", "three", "", *BARS]


def test_a_forked_process_prints_whole_lines_and_draws_nothing(screen: Screen, region: Region) -> None:
    region.draw(BARS)
    out = above(region, screen)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        screen.written = ""
        print("one\ntwo", file=out)
        out.write("no end")
        out.flush()
        region.draw(["not this"])
        os.write(theirs, screen.written.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    expected = "\r\x1b[Jone\n\r\x1b[Jtwo\n\r\x1b[Jno end\n"
    assert come(ours, lambda part: part.endswith("no end\n")) == expected
    os.close(ours)


def test_a_terminal_that_is_gone_does_not_end_the_run(region: Region, screen: Screen, monkeypatch: Any) -> None:
    def gone(_text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen, "write", gone)
    region.draw(BARS)
    region.draw(BARS)
    region.clear()


def test_only_a_terminal_is_stood_for(region: Region, screen: Screen, monkeypatch: Any) -> None:
    """`2> FILE` stays in the file."""

    class File(Screen):
        def isatty(self) -> bool:
            return False

    file = File()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", file)
    around = StdoutRedirect(region)
    around.begin()
    print("to the terminal")
    print("to the file", file=sys.stderr)
    around.end()
    assert screen.lines == ["to the terminal"]
    assert file.written == "to the file\n"
    assert (sys.stdout, sys.stderr) == (screen, file)


def test_a_log_of_it_has_what_was_printed_and_no_bar(tmp_path: Any, screen: Screen, region: Region) -> None:
    out = above(region, screen)
    for number in range(3):
        region.draw(BARS)
        print("line", number, file=out)
        screen.write(f"raw {number}\n")
        region.draw(BARS)
    region.clear()
    log = RankLog(0)
    log.open(tmp_path)
    data = screen.written.encode()
    for at in range(0, len(data), 7):  # in pieces of any size
        log.add(data[at : at + 7])
    log.close()
    assert (tmp_path / "rank-0.log").read_text() == "".join(f"line {n}\nraw {n}\n" for n in range(3))


def test_a_stream_that_cannot_encode_a_bar_takes_it_all_the_same() -> None:
    screen = Screen()
    screen.encoding = "latin-1"
    Region(screen, lambda: 40).draw(["损失 ━"])  # type: ignore[arg-type]
    assert screen.lines == ["", "?? ?"]


def come_to_show(ours: int, terminal: Screen, lines: list[str]) -> list[str]:
    """What a terminal shows of what comes through, as soon as it is this, or nothing more comes."""
    come(ours, lambda part: terminal.write(part) >= 0 and terminal.lines == lines)
    return terminal.lines


def come(ours: int, enough: Callable[[str], bool]) -> str:
    """What comes through a terminal, which may hand it out late and in parts; `enough` is asked after each of them."""
    seen, decoder = "", codecs.getincrementaldecoder("utf-8")()
    while select.select([ours], [], [], 10.0)[0]:
        part = decoder.decode(os.read(ours, 10_000))
        seen += part
        if enough(part):
            break
    return seen


def test_under_a_supervisor_other_ranks_print_at_once_and_clear_the_bars_away() -> None:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    terminal, shared = Screen(), Shared(theirs)
    drawing, other = object(), object()
    frame = Screen()
    region = Region(frame, lambda: 40)  # type: ignore[arg-type]
    region.draw(BARS)
    shared.show(drawing, frame.written.encode())
    shared.show(other, b"one\ntwo\nthree\n")
    assert shared.next_release() is None  # nothing waits
    assert come_to_show(ours, terminal, ["one", "two", "three"]) == ["one", "two", "three"]
    shared.show(drawing, frame.written.encode())
    assert come_to_show(ours, terminal, ["one", "two", "three", "", *BARS]) == ["one", "two", "three", "", *BARS]
    shared.end_line()
    assert come_to_show(ours, terminal, ["one", "two", "three"]) == ["one", "two", "three"]
    os.close(theirs)
    os.close(ours)


def test_under_a_supervisor_c_code_of_the_rank_that_draws_leaves_no_bar_behind_others() -> None:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    terminal, shared = Screen(), Shared(theirs)
    drawing, other = object(), object()
    frame = Screen()
    Region(frame, lambda: 40).draw(BARS)  # type: ignore[arg-type]
    shared.show(drawing, frame.written.encode())
    shared.show(drawing, b"its own C\n")
    shared.show(other, b"C of another\n")
    assert come_to_show(ours, terminal, ["its own C", "C of another"]) == ["its own C", "C of another"]
    os.close(theirs)
    os.close(ours)
