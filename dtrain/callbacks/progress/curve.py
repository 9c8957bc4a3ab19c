"""A small picture of a history as SVG text: a panel a metric, training and validation in it. A pure function."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.rundir.columns import VALID, paired
from dtrain.wording import number

_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 26
_MOST_PANELS = 2
_MOST_POINTS = 400  # of a curve: as many as there are pixels
_TRAIN, _VALID = "#2f78bd", "#c8601f"  # told apart also by those who see no red or green, on black and on white

Point = tuple[float, float]


def curves_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a picture of the first two metrics over the epochs, or "" before there is one.

    Values that are not finite leave a gap.

    Args:
        rows: of a history.
    """
    if not rows:
        return ""
    panels = list(paired(rows[-1]).items())[:_MOST_PANELS]
    drawn = [_panel(name, columns, rows, index * _WIDTH) for index, (name, columns) in enumerate(panels)]
    if not drawn:
        return ""
    size = f'width="{_WIDTH * len(drawn)}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH * len(drawn)} {_HEIGHT}"'
    font = 'font-family="system-ui, sans-serif" font-size="11" fill="currentColor"'
    label = html.escape(f"{', '.join(name for name, _ in panels)} over {len(rows)} epochs")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" {size} {font}'
    return f'{head} style="max-width:100%">{"".join(drawn)}</svg>'


def _panel(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], left: float) -> str:
    curves = {column: _points(column, rows) for column in columns}
    values = [y for points in curves.values() for _, y in points if math.isfinite(y)]
    if not values:
        text = f"{name}: no value yet"
        return f'<text x="{left + _LEFT}" y="{_TOP - 10}">{html.escape(text)}</text>'
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * 0.05
    low, high = low - room, high + room
    first, last = float(rows[0]["epoch"]), float(rows[-1]["epoch"])

    def place(point: Point) -> Point:
        share = (point[0] - first) / (last - first) if last > first else 0.5
        x = left + _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(name, columns, left, (low + room, high - room), (first, last))]
    for column, points in curves.items():
        parts += _curve([(*place(point),) if math.isfinite(point[1]) else None for point in points], _colour(column))
    return "".join(parts)


def _points(column: str, rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    stride = math.ceil(len(rows) / _MOST_POINTS)
    kept = [row for index, row in enumerate(rows) if (len(rows) - 1 - index) % stride == 0]  # the last one always
    return [(float(row["epoch"]), math.nan if row.get(column) is None else float(row[column])) for row in kept]


def _axes(
    name: str, columns: Sequence[str], left: float, values: tuple[float, float], epochs: tuple[float, float]
) -> str:
    x0, x1, y0, y1 = left + _LEFT, left + _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    parts = [f'<path d="M{x0} {y0}V{y1}H{x1}" fill="none" stroke="currentColor" stroke-opacity="0.4"/>']
    for value, y in ((values[1], y0 + 8), (values[0], y1 - 1)):
        parts.append(f'<text x="{x0 - 5}" y="{y:.1f}" text-anchor="end">{number(value)}</text>')
    ends = {epochs[0]: x0, epochs[1]: x1} if epochs[1] > epochs[0] else {epochs[0]: (x0 + x1) / 2}
    anchors = {x0: "start", x1: "end"}
    for epoch, x in ends.items():
        parts.append(f'<text x="{x}" y="{y1 + 14}" text-anchor="{anchors.get(x, "middle")}">{epoch:.0f}</text>')
    parts.append(f'<text x="{(x0 + x1) / 2}" y="{y1 + 23}" text-anchor="middle" fill-opacity="0.7">epoch</text>')
    parts.append(f'<text x="{x0}" y="{_TOP - 10}" font-weight="600">{html.escape(name)}</text>')
    x = x1
    for column in reversed(columns):
        word = "valid" if column.startswith(VALID) else "train"
        parts.append(f'<text x="{x}" y="{_TOP - 10}" text-anchor="end" fill="{_colour(column)}">{word}</text>')
        x -= 34
    return "".join(parts)


def _curve(points: Sequence[Point | None], colour: str) -> list[str]:
    """Lines between neighbours, and a dot where one has none."""
    parts, run = [], []
    for point in [*points, None]:
        if point is not None:
            run.append(f"{point[0]:.1f},{point[1]:.1f}")
        elif len(run) == 1:
            x, y = run[0].split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
            run = []
        elif run:
            parts.append(f'<polyline points="{" ".join(run)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
            run = []
    return parts


def _colour(column: str) -> str:
    return _VALID if column.startswith(VALID) else _TRAIN
