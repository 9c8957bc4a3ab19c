"""The live view as a whole, with a clock of the test's, and who gets which view."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from helpers.clock import Now, stopped
from helpers.screens import Screen

from dtrain.callbacks.progress import (
    LiveBar,
    PassFacts,
    PlainLines,
    RunFacts,
    bar,
    choose_progress,
    paced,
)

RUN = RunFacts(3, 1, lambda: 0.001)
ROW = {"epoch": 1, "loss": 0.5, "acc": 0.25, "val_loss": 0.75, "val_acc": 0.125, "lr": 1e-3, "seconds": 2.0}


class Table:
    """Running means that can be counted."""

    def __init__(self) -> None:
        self.steps, self.asked_for = 0, 0

    def running(self) -> dict[str, float]:
        self.asked_for += 1
        return {"loss": 0.5, "acc": 0.25}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    return stopped(monkeypatch, bar, paced)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    one = Screen(80, 12)
    monkeypatch.setattr(one, "fileno", lambda: 1, raising=False)

    def size(_file: int) -> os.terminal_size:
        return os.terminal_size((one.emulator.columns, one.emulator.lines))

    monkeypatch.setattr(bar.os, "get_terminal_size", size)
    return one


def a_pass(live: LiveBar, now: Now, table: Table, steps: int, seconds: float, split: str = "train") -> None:
    live.on_pass_start(PassFacts(split, 1, steps, samples=lambda: 10 * table.steps, run=RUN))
    for _ in range(steps):
        now.seconds += seconds / steps
        table.steps += 1
        live.on_progress(table)  # type: ignore[arg-type]


def test_a_thousand_steps_a_second_are_drawn_ten_times(screen: Screen, now: Now) -> None:
    live, table = LiveBar(screen), Table()
    a_pass(live, now, table, 5000, 5.0)
    assert 40 < screen.writes <= 51
    assert table.asked_for == screen.writes - 1  # the first drawing asks for nothing: there is nothing yet
    live.close()


def test_a_terminal_that_is_slow_is_drawn_on_less_often(
    screen: Screen, now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = screen.write

    def slowly(text: str) -> int:
        now.seconds += 0.1
        return write(text)

    monkeypatch.setattr(screen, "write", slowly)
    live = LiveBar(screen)  # type: ignore[arg-type]
    a_pass(live, now, Table(), 50_000, 50.0)
    assert 5 < screen.writes <= 12  # a fiftieth of the time, at most
    live.close()


def test_a_whole_epoch(screen: Screen, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    live, table = LiveBar(screen), Table()
    a_pass(live, now, table, 10, 2.0)
    first, second, third = screen.lines[1:]
    assert first.startswith("train 10/10  ━")
    assert first.endswith("━    50 samples/s  0:00 left")
    assert second.startswith("epoch 1/3    ━")
    assert second.endswith(" 0:04 left")
    assert third == "loss 0.5  acc 0.25  lr 0.001"
    a_pass(live, now, Table(), 10, 1.0, "valid")
    assert screen.lines[1].startswith("valid 10/10")
    live.on_epoch_end(ROW)
    assert screen.lines[0] == "epoch 1  loss 0.5  acc 0.25  val_loss 0.75  val_acc 0.125  2.0s"
    print("and the user's")
    assert screen.lines[1:3] == ["and the user's", ""]
    live.close()
    live.close()
    assert screen.lines[1:] == ["and the user's"]
    assert sys.stdout is screen


def test_it_can_begin_again_after_its_end(screen: Screen, now: Now) -> None:
    live = LiveBar(screen)  # type: ignore[arg-type]
    for _ in range(2):
        a_pass(live, now, Table(), 3, 1.0)
        assert "train 3/3" in screen.lines[-3]
        live.close()
        assert screen.lines == []


def test_a_terminal_of_another_size(screen: Screen, now: Now) -> None:
    live = LiveBar(screen)  # type: ignore[arg-type]
    for columns, rows in ((80, 12), (30, 12), (5, 12), (1, 12), (200, 12), (80, 3), (80, 1)):
        screen.emulator.resize(rows, columns)
        a_pass(live, now, Table(), 4, 1.0)
        assert len(screen.lines) <= rows
        drawn = screen.lines[screen.emulator.cursor.y + 1 :]  # the cursor waits above them
        assert all(len(line) < columns for line in drawn)
        assert bool(drawn) == (columns > 1 and rows > 1)
        live.on_epoch_end(ROW)
    live.close()
    assert "━" not in "".join(screen.lines)


def test_no_colour_and_no_utf8(screen: Screen, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(screen, "encoding", "iso-8859-1", raising=False)
    live = LiveBar(screen)  # type: ignore[arg-type]
    a_pass(live, now, Table(), 4, 1.0)
    live.on_epoch_end(ROW)
    assert screen.written.isascii()
    assert "####" in screen.written
    assert "\x1b[" in screen.written  # to move
    assert not any(f"\x1b[{code}m" in screen.written for code in range(30, 48))
    live.close()


def test_colours(screen: Screen, now: Now) -> None:
    live = LiveBar(screen)  # type: ignore[arg-type]
    a_pass(live, now, Table(), 4, 1.0)
    bars = [cell for row in (1, 2) for cell in screen.emulator.buffer[row].values() if cell.data == "━"]
    assert {cell.fg for cell in bars} == {"cyan", "green"}
    live.close()


@pytest.mark.parametrize(
    ("term", "tty", "view", "kind"),
    [
        ("xterm", True, "auto", LiveBar),
        ("dumb", True, "auto", PlainLines),
        ("", True, "auto", PlainLines),
        ("xterm", False, "auto", PlainLines),
        ("xterm", True, "plain", PlainLines),
        ("dumb", False, "rich", LiveBar),
    ],
)
def test_who_gets_which_view(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, term: str, tty: bool, view: Any, kind: type
) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(screen, "isatty", lambda: tty)
    assert type(choose_progress(is_main=True, log_step_freq=1, view=view)) is kind
    assert choose_progress(is_main=False, log_step_freq=1, view=view) is None
