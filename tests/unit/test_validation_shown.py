"""What is shown, told and kept of a validation within an epoch; and what the rates leave out."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clock import stopped
from helpers.screens import Screen

from dtrain.callbacks.progress import LiveBar, PassFacts, PlainLines, RunFacts, bar, paced
from dtrain.callbacks.progress.clock import Clock
from dtrain.callbacks.progress.events import Events
from dtrain.callbacks.progress.feed import FeedReader, FeedWriter
from dtrain.callbacks.progress.jsonl import JsonLines
from dtrain.callbacks.progress.lines import FINE, validation_parts
from dtrain.callbacks.tracking import tracking
from dtrain.callbacks.tracking.files import STEPS, StepLog, read_lines
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.engine.position import TrainPosition
from dtrain.errors import StopRequested
from dtrain.layout import TRACKING

ROW = {"epoch": 1, "step": 20, "val_loss": 0.75, "val_acc": 0.125, "seconds": 2.0}
RUN = RunFacts(3, 2, lambda: 0.001, lambda: 20)
TRAIN = PassFacts("train", 1, 40, run=RUN)
WITHIN = PassFacts("valid", 1, 5, within=True, run=RUN)


class Table:
    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def running(self) -> dict[str, float]:
        return {"loss": 0.5}


def played(view: Any) -> None:
    """Two train steps, a validation within the epoch, a third train step."""
    view.on_pass_start(TRAIN)
    for steps in (1, 2):
        view.on_progress(Table(steps))
    view.on_pass_start(WITHIN)
    view.on_progress(Table(1))
    view.on_validation_end(ROW)
    view.on_progress(Table(3))


def test_plain_lines_have_one_for_it_and_go_on() -> None:
    out = io.StringIO()
    played(PlainLines(1, out))
    assert out.getvalue().splitlines() == [
        "epoch 1/3, 40 steps",
        "[step = 1] rank 0: loss: 0.5",
        "[step = 2] rank 0: loss: 0.5",
        "[validation after 20 optimizer steps] val_loss: 0.75, val_acc: 0.125, time: 2.0s",
        "[step = 3] rank 0: loss: 0.5",
    ]


def test_values_of_one_rank_are_marked_where_there_are_several_and_their_lines_are_not() -> None:
    for facts, how, told in (
        (TRAIN, {}, "[step = 1] rank 0: loss: 0.5"),
        (TRAIN, {"mark": False}, "[step = 1] loss: 0.5"),
        (PassFacts("train", 1), {}, "[step = 1] loss: 0.5"),
    ):
        out = io.StringIO()
        view = PlainLines(1, out, **how)
        view.on_pass_start(facts)
        view.on_progress(Table(1))
        assert out.getvalue().splitlines()[1:] == [told]


def test_events_have_one_for_it_and_go_on() -> None:
    ours, theirs = os.pipe()
    try:
        played(JsonLines(Events(theirs), 1))
        told = [json.loads(line) for line in os.read(ours, 100_000).splitlines()]
    finally:
        os.close(ours)
        os.close(theirs)
    assert [event["event"] for event in told] == ["step", "step", "validation", "step"]
    assert (told[2]["epoch"], told[2]["updates"], told[2]["row"]) == (1, 20, ROW)
    assert [event["step"] for event in told if event["event"] == "step"] == [1, 2, 3]


def test_the_bar_shows_it_and_then_the_train_pass_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    now = stopped(monkeypatch, bar, paced)
    screen = Screen(80, 10)
    view = LiveBar(screen)
    monkeypatch.setattr(view, "_size", lambda: os.terminal_size((80, 10)))
    view.on_pass_start(TRAIN)
    now.seconds += 5
    view.on_progress(Table(20))
    view.on_pass_start(WITHIN)
    now.seconds += 5
    view.on_progress(Table(3))
    shown = screen.lines
    assert any(line.startswith("valid 3/5") for line in shown)
    assert not any("epoch 1/3" in line for line in shown), "a validation within it is no share of the run"
    view.on_validation_end(ROW)
    now.seconds += 5
    view.on_progress(Table(21))
    shown = screen.lines
    assert shown[0].startswith("step 20  val_loss 0.75  val_acc 0.125  2.0s")
    assert any(line.startswith("train 21/40") for line in shown) and any("epoch 1/3" in line for line in shown)
    assert not any("valid" in line for line in shown)
    view.close()


def test_a_narrow_line_leaves_the_last_values_out() -> None:
    (part,) = validation_parts(ROW, 26, FINE)
    assert part[1] == "step 20  val_loss 0.75"


def test_another_process_is_told_as_well(tmp_path: Path) -> None:
    out = io.StringIO()
    reader = FeedReader(tmp_path / "feed", PlainLines(1, out))
    played(FeedWriter(tmp_path / "feed"))
    reader.poll()
    assert "[validation after 20 optimizer steps] val_loss: 0.75" in out.getvalue()


def test_trackers_get_it_as_values_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = stopped(monkeypatch, tracking)
    monkeypatch.setattr(now, "time", lambda: 0.0, raising=False)
    told: list[Any] = []

    class Listener:
        name = "it"

        def run_id(self) -> str:
            return ""

        def log_steps(self, values: Any, step: int) -> None:
            told.append((dict(values), step))

    one = Tracking(tmp_path, StepLog(tmp_path), every=10.0, device=torch.device("cpu"))
    one.trackers.append(Listener())  # type: ignore[arg-type]
    aside = [0.0]
    one.on_pass_start(PassFacts("train", 1, 40, samples=lambda: 60, aside=lambda: aside[0], run=RUN))
    one.on_pass_start(WITHIN)
    now.seconds += 100
    aside[0] = 100.0
    one.on_progress(Table(3))  # type: ignore[arg-type] - of the validation
    assert told == []
    one.on_validation_end(ROW)
    assert told == [({"step/val_loss": 0.75, "step/val_acc": 0.125}, 20)]
    now.seconds += 20
    one._facts = PassFacts("train", 1, 40, samples=lambda: 160, aside=lambda: aside[0], run=RUN)
    one.on_progress(Table(4))  # type: ignore[arg-type]
    assert told[1][0]["step/samples_per_second"] == pytest.approx((160 - 60) * 2 / 20.0, rel=0.01)
    kept = read_lines(tmp_path / TRACKING / STEPS)
    assert [line["updates"] for line in kept] == [20, 20] and kept[0]["values"]["step/val_loss"] == 0.75
    one._log.close()


def test_rates_and_the_time_left_leave_out_what_is_no_part_of_the_pass() -> None:
    """100 steps of a second each; after ten of them, 50 seconds of something else."""
    clock, aside, samples = Clock(), [0.0], [0]
    facts = PassFacts("train", 1, 100, samples=lambda: samples[0], aside=lambda: aside[0])
    clock.begin(facts, 1000.0)
    samples[0] = 40
    clock.look(10, 1010.0)
    assert (clock.samples_per_second, clock.epoch_left(1010.0)) == (pytest.approx(4.0), pytest.approx(90.0))
    aside[0] = 50.0
    assert clock.epoch_left(1060.0) == pytest.approx(90.0)
    samples[0] = 80
    clock.look(20, 1070.0)
    assert (clock.samples_per_second, clock.epoch_left(1070.0)) == (pytest.approx(4.0), pytest.approx(80.0))
    clock.look(100, 1150.0)
    clock.begin(PassFacts("train", 2, 100), 1150.0)
    assert clock.epoch_left(1150.0) == pytest.approx(100.0), "as long as the last one, without the rest"


class Beats:
    """A heartbeat that is kept."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def enter(self, phase: str, epoch: int = 0) -> None:
        self.said.append((phase, epoch))

    def step(self, step: int) -> None:
        self.said.append(step)


def test_who_watches_for_hangs_is_told_of_both_passes() -> None:
    beats = Beats()
    place = TrainPosition(0, heartbeat=beats)  # type: ignore[arg-type]
    place.enter("train", 2)
    place.step = 6
    place.advance()
    with place.aside():
        place.enter("valid", 2)
        place.advance()
    assert beats.said == [("train", 2), 7, ("valid", 2), 1, ("train", 2), 7]
    assert (place.split, place.epoch, place.step) == ("train", 2, 7)
    with pytest.raises(StopRequested), place.aside():
        place.enter("valid", 2)
        raise StopRequested("on request")
    assert str(place) == "rank 0, epoch 2, train step 7", "a stop is taken there"
    with pytest.raises(ValueError, match="x"), place.aside():
        place.enter("valid", 2)
        place.advance()
        raise ValueError("x")
    assert str(place) == "rank 0, epoch 2, valid step 1", "an error is told where it was"
