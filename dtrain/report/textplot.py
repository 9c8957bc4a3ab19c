"""Curves in a terminal: dots of Braille, four rows and two columns of them to a character."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dtrain.report.curves import TIME, Line, Panel
from dtrain.report.words import duration, printable
from dtrain.wording import number

# Which bit of a Braille character is the dot of a column and a row; see Unicode 15, 21.1.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800
COLOURS = ("cyan", "yellow", "green", "magenta", "bright_blue", "bright_red", "white")
_LABEL = 11  # characters of the values' axis
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Piece = tuple[str, str | None]  # a text, and its colour


@dataclass
class _Canvas:
    """Characters to draw on."""

    width: int
    height: int
    bits: dict[tuple[int, int], int] = field(default_factory=dict)
    owners: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    letters: dict[tuple[int, int], str] = field(default_factory=dict)

    def dot(self, x: float, y: float, number: int) -> tuple[int, int]:
        """Sets the dot at a share of the width and of the height, from below; returns the character that it is in."""
        column = min(int(x * self.width * 2), self.width * 2 - 1)
        row = min(int((1 - y) * self.height * 4), self.height * 4 - 1)
        cell = row // 4, column // 2
        self.bits[cell] = self.bits.get(cell, 0) | _BITS[column % 2][row % 4]
        self._own(cell, number)
        return cell

    def letter(self, cell: tuple[int, int], number: int) -> None:
        """Puts a run's letter at a character, or left of it where another run's is there already."""
        row, column = cell
        while column > 0 and (row, column) in self.letters:
            column -= 1
        self.letters[row, column] = _letter(number)
        self.owners[row, column] = [number]

    def _own(self, cell: tuple[int, int], number: int) -> None:
        """Of lines that coincide, each has the colour of some of the characters; the latest drawn is the last."""
        owners = self.owners.setdefault(cell, [])
        if number not in owners:
            owners.append(number)

    def colour(self, cell: tuple[int, int]) -> str | None:
        """The colour of a character."""
        owners = self.owners.get(cell, [])
        return COLOURS[owners[cell[1] % len(owners)] % len(COLOURS)] if owners else None

    def row(self, row: int, *, braille: bool) -> list[Piece]:
        """Returns a row in pieces of one colour."""
        pieces: list[Piece] = []
        for column in range(self.width):
            cell = row, column
            bits = self.bits.get(cell, 0)
            plain = chr(_BRAILLE + bits) if braille else "*"
            text = self.letters.get(cell) or (plain if bits else " ")
            pieces.append((text, self.colour(cell)))
        return pieces


@dataclass(frozen=True)
class PlotStyle:
    """How panels are drawn.

    Attributes:
        x: what the x axis is.
        log: whether the values' axis is logarithmic.
        width: characters.
        height: rows of the curve itself.
        braille: whether the terminal can show it; else there are asterisks.
    """

    x: str
    log: bool
    width: int
    height: int = 11
    braille: bool = True


def text_panel(panel: Panel, look: PlotStyle) -> list[list[Piece]]:
    """Returns a panel as lines of text, each in pieces of one colour.

    Each run has a letter at the end of its validation's line; the training's line has gaps.
    """
    log = look.log
    scaled = {line: [math.log10(y) if log else y for y in line.drawable(log=log)] for line in panel.lines}
    xs = [p for line in panel.lines for p in line.xs if math.isfinite(p)]
    ys = [y for values in scaled.values() for y in values if not math.isnan(y)]
    title: list[Piece] = [(printable(panel.title), "bold")]
    if not xs or not ys:
        return [title, [("  (no finite values)", None)]]
    canvas = _Canvas(max(look.width - _LABEL - 2, 10), look.height)
    across, up = _Scale(min(xs), max(xs)), _Scale(min(ys), max(ys))
    # Those of the validation come last, and so lie on top.
    for line in sorted(panel.lines, key=lambda line: not line.train):
        _trace(canvas, line, [(across(p), up(y)) for p, y in zip(line.xs, scaled[line], strict=True)])
    middle = min(ys) / 2 + max(ys) / 2
    labels = {0: max(ys), look.height // 2: middle, look.height - 1: min(ys)}
    ticks = {row: number(10 ** min(y, 308.25) if log else y) for row, y in labels.items()}
    rows: list[list[Piece]] = [
        [(f"{ticks.get(row, ''):>{_LABEL}} ┤", None), *canvas.row(row, braille=look.braille)]
        for row in range(look.height)
    ]
    foot: list[Piece] = [(" " * (_LABEL + 2) + _foot(look, min(xs), max(xs), canvas.width), None)]
    remarks: list[list[Piece]] = [[("  " + printable(remark), None)] for remark in panel.remarks(log=log)]
    return [title, *rows, foot, *remarks]


def _foot(look: PlotStyle, low: float, high: float, width: int) -> str:
    """The x axis in words: its ends, and between them what it is."""
    start, end = (duration(value * 3600) if look.x == TIME else f"{value:g}" for value in (low, high))
    middle = "training time" if look.x == TIME else printable(look.x)
    return f"{start} {middle:^{max(width - len(start) - len(end) - 2, 1)}} {end}"


def legend(lines: Sequence[Line]) -> list[Piece]:
    """Returns which letter is whose."""
    runs = {line.number: line.run.name for line in lines}
    pieces: list[Piece] = []
    for which, name in runs.items():
        pieces += [(f"{_letter(which)} {printable(name)}", COLOURS[which % len(COLOURS)]), ("   ", None)]
    return pieces


@dataclass(frozen=True)
class _Scale:
    """From values to shares of an axis; NaN for what is not on it."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        span = self.high / 2 - self.low / 2  # the whole may be more than there is
        if not math.isfinite(value):
            return math.nan
        return 0.5 if span == 0 else (value / 2 - self.low / 2) / span


def _trace(canvas: _Canvas, line: Line, points: Sequence[tuple[float, float]]) -> None:
    """Draws a line through the points that there are."""
    before: tuple[float, float] | None = None
    last: tuple[int, int] | None = None
    for x, y in points:
        if math.isnan(x) or math.isnan(y):
            before = None
            continue
        if before is not None:
            _stroke(canvas, line, before, (x, y))
        last = canvas.dot(x, y, line.number)
        before = (x, y)
    if last is not None and not line.train:
        canvas.letter(last, line.number)


def _stroke(canvas: _Canvas, line: Line, start: tuple[float, float], end: tuple[float, float]) -> None:
    (x, y), (to_x, to_y) = start, end
    steps = max(1, round(max(abs(to_x - x) * canvas.width * 2, abs(to_y - y) * canvas.height * 4)))
    for step in range(steps):
        share = step / steps
        here = x + (to_x - x) * share
        if line.train and int(here * canvas.width) % 2:  # dashes
            continue
        canvas.dot(here, y + (to_y - y) * share, line.number)


def _letter(number: int) -> str:
    return LETTERS[number % len(LETTERS)]
