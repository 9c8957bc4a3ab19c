"""The lines of the live view, from what is known: text alone, fitted to a width. Each part goes in a set order.

::

    train 45/90  ━━━━━━━━━━━━━━━━━━━━╸────────────────────  12.3k samples/s     0:12 left
    epoch 3/10   ━━━━━━━━━╸───────────────────────────────                   1:23:45 left
    loss 0.3121  accuracy 0.9010  lr 0.001
    a line of the user's own (`Run.status`), where there is one

What does not fit goes in this order: the word "samples", the rate, the bar, the time left; of the values the learning
rate, then the last metrics; of an epoch's line the time, then the training's metrics but the first, then the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size

from dtrain.callbacks.progress.clock import Clock, short_number, short_time
from dtrain.rundir.columns import VALID, metrics_of
from dtrain.wording import number

_LEAST_BAR, _MOST_BAR = 8, 60
# Room that is kept for what is not known yet, so that a bar does not jump when it comes.
_RATES, _LEFT = (len("9999 samples/s"), len("9999/s"), 0), len("0:00 left")
_GAP = "  "

Part = tuple[str, str]  # its style, its text


@dataclass(frozen=True)
class Glyphs:
    """What bars are drawn with.

    Attributes:
        full: a done cell.
        half: the one that is on its way.
        empty: one that is left.
        cut: stands where text was cut off.
    """

    full: str
    half: str
    empty: str
    cut: str


FINE = Glyphs("━", "╸", "─", "…")
ASCII = Glyphs("#", "-", ".", "~")


@dataclass(frozen=True)
class _Gauge:
    """One line with a bar.

    Attributes:
        label: what it measures, with its count.
        share: how much of it is done, 0 to 1; None where that is not known.
        rates: how fast it goes, the longest way to say it first.
        left: the time left.
        style: of the bar.
    """

    label: str
    share: float | None
    rates: tuple[str, ...]
    left: str
    style: str


def lines_of(clock: Clock, values: Mapping[str, float], now: float, width: int, glyphs: Glyphs) -> list[list[Part]]:
    """Returns the live view, a list of parts a line; no line is wider than the width.

    Args:
        clock: of the run.
        values: metric -> running mean.
        now: the time by the clock.
        width: in cells.
        glyphs: of the bars.
    """
    facts = clock.facts
    if facts is None:
        return []
    gauges = [_of_pass(clock, now)]
    if facts.epochs > 1 and not facts.within:
        gauges.append(_of_run(clock, now))
    lr = facts.lr() if facts.split == "train" else None
    status: list[list[Part]] = [[("", _fitted(line, width, glyphs))] for line in facts.run.status]
    return [*_gauges(gauges, width, glyphs), *_values(values, lr, width, glyphs), *status]


def epoch_parts(row: Mapping[str, Any], width: int, glyphs: Glyphs) -> list[Part]:
    """Returns the line of an epoch that is over, no wider than the width."""
    return _row_parts("epoch", row, width, glyphs)


def validation_parts(row: Mapping[str, Any], width: int, glyphs: Glyphs) -> list[Part]:
    """Returns the line of a validation within an epoch, after so many optimizer steps, no wider than the width."""
    return _row_parts("step", row, width, glyphs)


def _row_parts(what: str, row: Mapping[str, Any], width: int, glyphs: Glyphs) -> list[Part]:
    metrics = [name for name in metrics_of(row) if name != what]
    trained = [name for name in metrics if not name.startswith(VALID)]
    said = {what: str(row[what]), **{name: number(row[name]) for name in metrics}}
    time = f"{row['seconds']:.1f}s"
    leaves = [*reversed(trained[1:]), *(name for name in reversed(metrics) if name not in trained[1:])]

    def text() -> str:
        return _GAP.join([*(f"{name} {value}" for name, value in said.items()), *([time] if time else [])])

    for name in ["", *leaves]:
        if cell_len(text()) <= width:
            break
        time, _ = "", said.pop(name, None)
    return [("", _fitted(text(), width, glyphs))]


def _of_pass(clock: Clock, now: float) -> _Gauge:
    facts, total = clock.facts, clock.total
    assert facts is not None  # noqa: S101 - for the type checker
    about = "~" if facts.steps is None else ""
    label = f"{facts.title} {clock.steps}" + ("" if total is None else f"/{about}{total}")
    rate = clock.samples_per_second
    rates = () if rate is None else (f"{short_number(rate)} samples/s", f"{short_number(rate)}/s")
    left = clock.epoch_left(now)
    share = min(1.0, clock.steps / total) if total else None
    return _Gauge(label, share, rates, "" if left is None else f"{short_time(left)} left", "cyan")


def _of_run(clock: Clock, now: float) -> _Gauge:
    facts, total = clock.facts, clock.total
    assert facts is not None  # noqa: S101 - for the type checker
    within = 1.0 if facts.split != "train" else min(1.0, clock.steps / total) if total else 0.0
    left = clock.run_left(now)
    label = f"epoch {facts.epoch}/{facts.epochs}"
    share = min(1.0, (facts.epoch - 1 + within) / facts.epochs)
    return _Gauge(label, share, (), "" if left is None else f"{short_time(left)} left", "green")


def _gauges(gauges: Sequence[_Gauge], width: int, glyphs: Glyphs) -> list[list[Part]]:
    """Lays the gauges out in columns that they share."""
    label = max(cell_len(gauge.label) for gauge in gauges)
    left = max(_LEFT, *(cell_len(gauge.left) for gauge in gauges))
    for form in (0, 1, 2):
        rates = [gauge.rates[form] if form < len(gauge.rates) else "" for gauge in gauges]
        rate = max(_RATES[form], *map(cell_len, rates))
        bar = width - label - sum(len(_GAP) + part for part in (rate, left) if part) - len(_GAP)
        if bar >= _LEAST_BAR:
            bar = min(bar, _MOST_BAR)
            break
    else:
        bar, rate = 0, 0
    lines = []
    for gauge, text in zip(gauges, rates, strict=True):
        parts = [("bold", set_cell_size(gauge.label, label))]
        if bar:
            parts += [("", _GAP), *_bar(gauge, bar, glyphs)]
        if rate:
            parts += [("", _GAP), ("", text.rjust(rate))]
        if left and label + len(_GAP) + left <= width:
            parts += [("", _GAP), ("dim", gauge.left.rjust(left))]
        lines.append([("bold", _fitted(gauge.label, width, glyphs))] if label > width else parts)
    return lines


def _bar(gauge: _Gauge, width: int, glyphs: Glyphs) -> list[Part]:
    if gauge.share is None:
        return [("dim", glyphs.empty * width)]
    halves = int(gauge.share * width * 2)
    full, half = divmod(halves, 2)
    done = glyphs.full * full + glyphs.half * half
    return [(gauge.style, done), ("dim", glyphs.empty * (width - full - half))]


def _values(values: Mapping[str, float], lr: float | None, width: int, glyphs: Glyphs) -> list[list[Part]]:
    """One line of them, also where there is nothing yet."""
    said = [f"{name} {number(value)}" for name, value in values.items()]
    rate = [] if lr is None else [f"lr {number(lr)}"]
    if cell_len(_GAP.join([*said, *rate])) <= width:
        return [[("", _GAP.join([*said, *rate]))]]
    while len(said) > 1 and cell_len(_GAP.join(said)) > width:
        said.pop()
    return [[("", _fitted(_GAP.join(said or rate), width, glyphs))]]


def _fitted(text: str, width: int, glyphs: Glyphs) -> str:
    """Cuts a text that is too wide, and shows that."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)) + glyphs.cut * (width > 0)
