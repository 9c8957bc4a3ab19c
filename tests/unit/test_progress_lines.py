"""The lines of the live view at any width: nothing is wider, and what goes first is as its module says."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dtrain.callbacks.progress import PassFacts, RunFacts
from dtrain.callbacks.progress.clock import Clock
from dtrain.callbacks.progress.lines import ASCII, FINE, epoch_parts, lines_of

VALUES = {"loss": 0.31212, "accuracy": 0.9, "f1": 0.25}


def clock_at(
    step: int = 45, *, steps: int | None = 90, epoch: int = 3, split: str = "train", epochs: int = 10
) -> Clock:
    clock, samples = Clock(), [0]
    clock.begin(PassFacts(split, epoch, steps, samples=lambda: samples[0], run=RunFacts(epochs, 1, lambda: 1e-3)), 0.0)
    samples[0] = 45_000
    clock.look(step, 10.0)
    return clock


def shown(width: int, clock: Clock | None = None, values: dict[str, float] = VALUES) -> list[str]:
    lines = lines_of(clock or clock_at(), values, 10.0, width, FINE)
    return ["".join(text for _, text in line) for line in lines]


def test_all_is_said_where_there_is_room() -> None:
    first, second, third = shown(79)
    assert first.split("━")[0] == "train 45/90  "
    assert first.endswith("  4500 samples/s  0:10 left")
    assert second.split("━")[0] == "epoch 3/10   "
    assert second.endswith(" 2:30 left")
    assert third == "loss 0.3121  accuracy 0.9  f1 0.25  lr 0.001"
    assert first.count("━") == pytest.approx(sum(first.count(glyph) for glyph in "━╸─") / 2, abs=1)
    assert cell_len(first) == cell_len(second)


def test_what_goes_first() -> None:
    def has(width: int) -> list[str]:
        text = "\n".join(shown(width))
        marks = {"samples": "samples/s", "rate": "/s", "bar": "─", "left": "left", "lr": "lr", "f1": "f1"}
        return [name for name, mark in marks.items() if mark in text]

    order = [has(width) for width in range(79, 12, -1)]
    assert order[0] == ["samples", "rate", "bar", "left", "lr", "f1"]
    goes = [name for before, now in itertools.pairwise(order) for name in before if name not in now]
    gauges = [name for name in goes if name not in {"lr", "f1"}]
    assert gauges == ["samples", "rate", "bar", "left"]
    assert goes.index("lr") < goes.index("f1")


@given(
    width=st.integers(1, 220),
    step=st.integers(1, 10**6),
    steps=st.none() | st.integers(1, 10**6),
    epochs=st.integers(1, 5000),
    names=st.lists(st.sampled_from(["loss", "acc", "损失", "a_long_name_of_a_metric"]), unique=True),
)
def test_no_line_is_ever_wider_than_the_terminal(
    width: int, step: int, steps: int | None, epochs: int, names: list[str]
) -> None:
    clock = clock_at(step, steps=steps, epoch=1, epochs=epochs)
    values = dict.fromkeys(names, 1.5)
    for line in shown(width, clock, values):
        assert cell_len(line) <= width
    row = {"epoch": 1, **values, **{f"val_{name}": 2.5 for name in names}, "lr": 0.1, "seconds": 3.0}
    assert cell_len(epoch_parts(row, width, FINE)[0][1]) <= width


def test_a_loader_that_cannot_tell_has_a_count_and_no_share() -> None:
    first, second, _ = shown(60, clock_at(steps=None))
    assert first.startswith("train 45    ")
    assert "━" not in first
    assert "left" not in first + second


def test_one_pass_alone_has_one_bar_and_no_rate_of_learning() -> None:
    lines = shown(79, clock_at(split="valid", epochs=1))
    assert len(lines) == 2
    assert lines[0].startswith("valid 45/90")
    assert "lr" not in lines[1]


def test_an_epochs_line_keeps_what_matters_most() -> None:
    row = {"epoch": 3, "loss": 0.103, "accuracy": 0.967, "val_loss": 0.094, "val_accuracy": 0.983, "lr": 0.1}
    row |= {"seconds": 0.84, "samples_per_second": 100.0}

    def line(width: int) -> str:
        return epoch_parts(row, width, FINE)[0][1]

    assert line(200) == "epoch 3  loss 0.103  accuracy 0.967  val_loss 0.094  val_accuracy 0.983  0.8s"
    assert line(75) == "epoch 3  loss 0.103  accuracy 0.967  val_loss 0.094  val_accuracy 0.983"
    assert line(60) == "epoch 3  loss 0.103  val_loss 0.094  val_accuracy 0.983"
    assert line(40) == "epoch 3  loss 0.103  val_loss 0.094"
    assert line(5) == "epoc…"


def test_bars_in_ascii() -> None:
    text = "".join(part for line in lines_of(clock_at(), VALUES, 10.0, 60, ASCII) for _, part in line)
    assert text.isascii()
    assert "####" in text
