"""Curves as a picture: PNG, SVG or PDF."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtrain.report.curves import Line, Panel, axis_title
from dtrain.report.words import printable
from dtrain.rundir.columns import EPOCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FORMATS = ("png", "svg", "pdf")
# After Okabe and Ito, "Color Universal Design", 2008: people with any colour vision can tell them apart. Without the
# yellow, which is hardly seen on white, and somewhat darker.
COLOURS = ("#0072b2", "#d55e00", "#008a64", "#b8578f", "#a87000", "#3a8fc4", "#4d4d4d")
_STYLES = ("-", ":", "-.")  # of the first runs, and of those whose colours come again
_FEW_POINTS = 30
_COINCIDES = 0.006  # of the values' range: about the width of a line
_DASH = 5.0  # in widths of the line
_FEW_RUNS = 6
_LONGEST_NAME = 42
_LONGEST_REMARK = 90


def picture(panels: Sequence[Panel], *, x: str, log: bool, kind: str) -> bytes:
    """Returns a picture of panels.

    Args:
        panels: at least one.
        x: what the x axis is.
        log: whether the values' axes are logarithmic.
        kind: png, svg or pdf.
    """
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # an axis to 1e308 has no margin: it is cut there
        draw(panels, x=x, log=log).savefig(out, format=kind, dpi=130)
    return out.getvalue()


def draw(panels: Sequence[Panel], *, x: str, log: bool) -> Figure:
    """Returns the picture as matplotlib's own; see `picture`."""
    from matplotlib.figure import Figure

    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.0 + (6.4 if columns == 1 else 5.2) * columns, 0.6 + 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for one, panel in zip(axes, panels, strict=False):
        _panel(one, panel, x=x, log=log)
    for one in axes[len(panels) :]:
        one.remove()
    _legend(figure, panels)
    return figure


def _panel(axes: Axes, panel: Panel, *, x: str, log: bool) -> None:
    crowded = len({line.number for line in panel.lines}) > _FEW_RUNS
    places = coinciding(panel, log=log)
    for line in panel.lines:
        _line(axes, line, log=log, width=1.2 if crowded else 1.8, place=places[line])
    axes.set_title(
        _cut(printable(panel.title), _LONGEST_NAME), parse_math=False, loc="left", fontsize="medium", fontweight="bold"
    )
    axes.grid(visible=True, color="#e4e7ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    values = [y for line in panel.lines for y in line.drawable(log=log)]
    if log and not all(map(math.isnan, values)):
        axes.set_yscale("log")
    if x == EPOCH:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        epochs = [x for line in panel.lines for x in line.xs]
        if epochs and min(epochs) == max(epochs):
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    remarks = [_cut(printable(remark), _LONGEST_REMARK) for remark in panel.remarks(log=log)]
    if len(remarks) > 2:
        remarks[1:] = [f"and {len(remarks) - 1} more lines with such values"]
    axes.set_xlabel("\n".join([printable(axis_title(x)), *remarks]), parse_math=False, fontsize="small")


def _line(axes: Axes, line: Line, *, log: bool, width: float, place: Place) -> None:
    ys = line.drawable(log=log)
    shown = list(range(len(ys))) if len(ys) <= _FEW_POINTS and not line.train else _lonely(ys)
    look = _look(line.number, train=line.train, width=width)
    if line.train and place.above:
        look |= {"color": _lighter(look["color"]), "alpha": 1.0, "zorder": 3}
    elif not line.train and place.of > 1:  # dashes of all colours in turn
        look |= {"linestyle": (place.number * _DASH, (_DASH, (place.of - 1) * _DASH)), "dash_capstyle": "butt"}
        shown = shown[place.number :: place.of] if len(shown) > place.of else shown
    axes.plot(line.xs, ys, marker="o", markersize=3.5, markevery=shown, **look)
    colour = look["color"]
    if line.best is not None and not math.isnan(ys[line.best]):
        # Rings of coinciding lines lie around one another.
        axes.plot(line.xs[line.best], ys[line.best], "o", ms=9 + 4 * place.number, mfc="none", mew=1.6, color=colour)
    for rows, marker, height in ((line.odd, "x", 0.985), (line.resumed, "^", 0.015)):
        where = [line.xs[row] for row in rows]
        axes.plot(where, [height] * len(where), marker, color=colour, ms=6, transform=axes.get_xaxis_transform())


@dataclass(frozen=True)
class Place:
    """Where a line stands among those of its panel that it coincides with.

    Attributes:
        number: of the line among those of its kind (training, or validation).
        of: how many of them there are, itself included.
        above: whether it coincides with one of the other kind.
    """

    number: int = 0
    of: int = 1
    above: bool = False


def coinciding(panel: Panel, *, log: bool) -> dict[Line, Place]:
    """Returns, for each line of a panel, where it stands among those that hide each other."""
    drawn = {line: _scaled(line, log=log) for line in panel.lines}
    finite = [y for ys in drawn.values() for y in ys if not math.isnan(y)]
    width = (max(finite) - min(finite)) * _COINCIDES if finite else 0.0
    groups: list[list[Line]] = []
    for line in panel.lines:
        group = next((one for one in groups if _alike((one[0].xs, drawn[one[0]]), (line.xs, drawn[line]), width)), None)
        if group is None:
            groups.append([line])
        else:
            group.append(line)
    places: dict[Line, Place] = {}
    for group in groups:
        for kind in (False, True):
            same = [line for line in group if line.train is kind]
            places |= {line: Place(n, len(same), len(same) < len(group)) for n, line in enumerate(same)}
    return places


def _scaled(line: Line, *, log: bool) -> list[float]:
    return [math.log10(y) if log else y for y in line.drawable(log=log)]


def _alike(
    one: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]], width: float
) -> bool:
    """Whether two lines lie within a line's width of each other, at all points that both have."""
    left = {x: y for x, y in zip(*one, strict=True) if not math.isnan(y)}
    right = {x: y for x, y in zip(*other, strict=True) if not math.isnan(y)}
    both = left.keys() & right.keys()
    return len(both) >= max(1, min(len(left), len(right)) * 0.9) and all(abs(left[x] - right[x]) <= width for x in both)


def _lighter(colour: str) -> str:
    """A colour most of the way to white, which shows on a line of the colour itself."""
    return "#" + "".join(f"{(int(colour[at : at + 2], 16) + 3 * 255) // 4:02x}" for at in (1, 3, 5))


def _lonely(ys: Sequence[float]) -> list[int]:
    """The points that have no neighbour to draw a line to."""
    there = [False, *(not math.isnan(y) for y in ys), False]
    return [i for i in range(len(ys)) if there[i + 1] and not there[i] and not there[i + 2]]


def _look(number: int, *, train: bool, width: float = 1.8) -> dict[str, Any]:
    colour = COLOURS[number % len(COLOURS)]
    if train:
        return {"color": colour, "linestyle": (0, (4, 3)), "linewidth": 0.6 * width, "alpha": 0.65}
    return {"color": colour, "linestyle": _STYLES[number // len(COLOURS) % len(_STYLES)], "linewidth": width}


def _legend(figure: Figure, panels: Sequence[Panel]) -> None:
    """Says what is what, outside of the panels: runs below them, many runs beside them."""
    from matplotlib.lines import Line2D

    lines = [line for panel in panels for line in panel.lines]
    runs = {line.number: line.run.name for line in lines}
    entries = [
        (Line2D([], [], **_look(n, train=False)), _cut(printable(name), _LONGEST_NAME)) for n, name in runs.items()
    ]
    entries += _signs(lines)
    beside = len(runs) > _FEW_RUNS
    legend = figure.legend(
        [handle for handle, _ in entries],
        ["-"] * len(entries),
        loc="outside right upper" if beside else "outside lower center",
        ncols=1 if beside else min(5, len(entries)),
        fontsize="small",
        frameon=False,
        handlelength=2.6,
    )
    for text, (_, words) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(words)


def _signs(lines: Sequence[Line]) -> list[tuple[Line2D, str]]:
    """What the dashes and marks mean, as far as there are any."""
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": "#555555"}
    found = []
    if any(line.train for line in lines):
        found += [
            (Line2D([], [], linestyle=(0, (4, 3)), linewidth=1.1, **grey), "training"),
            (Line2D([], [], linewidth=1.8, **grey), "validation"),
        ]
    if any(line.best is not None for line in lines):
        found.append((Line2D([], [], linestyle="", marker="o", ms=8, mfc="none", mew=1.5, **grey), "best epoch"))
    if any(line.resumed for line in lines):
        found.append((Line2D([], [], linestyle="", marker="^", ms=6, **grey), "started again"))
    if any(line.odd for line in lines):
        found.append((Line2D([], [], linestyle="", marker="x", ms=6, **grey), "NaN or infinite"))
    return found


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
