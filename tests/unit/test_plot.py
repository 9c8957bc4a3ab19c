"""Plots: their points are the histories' values; nothing that a history may hold breaks them."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import select
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import BIN, Dtrain, clean_environment
from helpers.runs import a_start, aged, cells, make_run, rows
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

from dtrain.errors import UsageError
from dtrain.report.curves import Panel, make_panels
from dtrain.report.finding import find_runs
from dtrain.report.picture import COLOURS, draw, picture
from dtrain.report.runs import Run, read_run
from dtrain.report.textplot import PlotStyle, legend, text_panel


def read(*folders: Path) -> list[Run]:
    return [read_run(place) for place in find_runs([str(folder) for folder in folders], Path("runs"))]


def a_run(name: str, *values: float, column: str = "val_loss") -> Run:
    texts = tuple((str(n), repr(value)) for n, value in enumerate(values, 1))
    return Run(name, Path(name), ("epoch", column), texts)


def pixels(image: bytes, colour: str) -> int:
    """How many pixels have a colour."""
    data = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(data - wanted).sum(axis=2) < 12).sum())


def text_of(panel: Panel, **look: Any) -> list[str]:
    how = PlotStyle(**({"x": "epoch", "log": False, "width": 60} | look))
    return ["".join(text for text, _ in line) for line in text_panel(panel, how)]


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", ["epoch", "time", "lr"])
def test_the_points_are_the_histories_values_to_the_last_bit(tmp_path: Path, x: str) -> None:
    long, odd = rows(40), rows(12, 3)
    odd[4]["val_loss"], odd[5]["accuracy"] = math.nan, ""
    folders = [make_run(tmp_path / name, made) for name, made in (("long", long), ("odd", odd))]
    panels = make_panels(read(*folders), x=x)
    assert [panel.title for panel in panels] == ["loss", "accuracy"]
    figure = draw(panels, x=x, log=False)
    for axes, panel in zip(figure.axes, panels, strict=True):
        curves = [line for line in axes.lines if line.get_linestyle() != "None"]
        expected = [(folder, column) for folder in folders for column in (panel.title, f"val_{panel.title}")]
        assert [(line.run.folder, line.column) for line in panel.lines] == expected
        for curve, (folder, column) in zip(curves, expected, strict=True):
            table = cells(folder)
            times = np.cumsum([float(row["seconds"]) for row in table]) / 3600
            where = times if x == "time" else [float(row[x]) for row in table]
            np.testing.assert_array_equal(np.asarray(curve.get_xdata(), float), where)
            values = [float(row[column] or "nan") for row in table]
            np.testing.assert_array_equal(np.asarray(curve.get_ydata(), float), values)


def test_marks_of_the_best_epoch_of_starts_and_of_what_is_not_finite(tmp_path: Path) -> None:
    made = rows(40)
    made[7]["val_loss"] = math.inf
    starts = [a_start(1.0), a_start(2.0, epoch=12), a_start(3.0, epoch=30), a_start(4.0, epoch=99)]
    (panel, _) = make_panels(read(make_run(tmp_path / "run", made, starts=starts)))
    (axes,) = draw([panel], x="epoch", log=False).axes
    marks = {
        str(line.get_marker()): list(np.asarray(line.get_xdata(), float))
        for line in axes.lines
        if line.get_linestyle() == "None" and len(line.get_xdata())
    }
    best = min(cells(tmp_path / "run"), key=lambda row: float(row["val_loss"]))
    assert marks == {"o": [float(best["epoch"])], "x": [8.0], "^": [12.0, 30.0]}
    assert panel.remarks(log=False) == ["run: val_loss of 1 epoch is NaN or infinite"]


def test_twelve_runs_look_different_and_their_names_stand_beside() -> None:
    runs = [a_run(f"run-{n}", *(math.exp(-e / 9) + n for e in range(60))) for n in range(12)]
    figure = draw(make_panels(runs), x="epoch", log=False)
    looks = {
        (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines if line.get_linestyle() != "None"
    }
    assert len(looks) == 12
    figure.draw_without_rendering()
    (box,) = (one.get_window_extent() for one in figure.legends)
    assert box.x0 >= figure.axes[0].get_window_extent().x1
    assert [text.get_text() for text in figure.legends[0].get_texts()][:12] == [run.name for run in runs]


def test_one_epoch_is_a_dot_that_can_be_seen() -> None:
    image = picture(make_panels([a_run("one", 0.5, column="accuracy")]), x="epoch", log=False, kind="png")
    nothing = picture(make_panels([a_run("one", math.nan, column="accuracy")]), x="epoch", log=False, kind="png")
    legend_alone = pixels(nothing, COLOURS[0])
    assert pixels(image, COLOURS[0]) > legend_alone + 20


def test_a_point_between_gaps_is_a_dot() -> None:
    values = [math.nan, 0.5, math.nan] * 20
    (axes,) = draw(make_panels([a_run("one", *values)]), x="epoch", log=False).axes
    assert axes.lines[0].get_markevery() == [i for i, value in enumerate(values) if value == 0.5]


EXTREMES = [
    [1e308, -1e308, 0.0],
    [5e-324, 1e-300],
    [math.nan] * 3,
    [math.inf, -math.inf],
    [0.0, 0.0],
    [-1.0, -2.0],
    [1.0],
    [1e300, 1e-300],
]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", EXTREMES)
def test_extremes_are_drawn_without_a_word(values: list[float], log: bool) -> None:
    panels = make_panels([a_run("one", *values)])
    assert picture(panels, x="epoch", log=log, kind="png").startswith(b"\x89PNG")
    assert text_of(panels[0], log=log)


@pytest.mark.parametrize("name", ["$x^2$", "_hidden", "日本語", "a\x1b[31mb\nc", "<b>&amp;", "n" * 300, "\\frac{", "$"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_names_are_text_and_no_formula(name: str, kind: str) -> None:
    run = Run(name, Path(name), ("epoch", name or "x"), (("1", "0.5"), ("2", "nan")))
    panels = make_panels([run])
    assert picture(panels, x="epoch", log=True, kind=kind)
    figure = draw(panels, x="epoch", log=False)
    shown = figure.legends[0].get_texts()[0].get_text()
    assert shown.isprintable()
    assert len(shown) <= 42


def test_runs_of_different_metrics_and_without_rows() -> None:
    runs = [a_run("a", 0.5), a_run("b", 0.5, column="f1"), Run("c", Path("c"))]
    panels = make_panels(runs)
    assert [(panel.title, [line.run.name for line in panel.lines]) for panel in panels] == [
        ("loss", ["a"]),
        ("f1", ["b"]),
    ]
    assert panels[1].lines[0].number == 1, "a run's colour is the same in all panels"


@pytest.mark.parametrize(
    ("metrics", "x", "words"),
    [
        (
            ["los"],
            "epoch",
            "--metric los: no run has this column. Did you mean 'loss'? Columns: epoch, loss, accuracy",
        ),
        ([], "tme", "--x tme: no run has this column. Did you mean 'time'?"),
    ],
)
def test_what_is_not_there(tmp_path: Path, metrics: list[str], x: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        make_panels(read(make_run(tmp_path / "run", rows(3))), metrics, x)
    assert words in str(raised.value)


def test_a_metric_by_its_name_and_by_its_column(tmp_path: Path) -> None:
    runs = read(make_run(tmp_path / "run", rows(3)))
    panels = make_panels(runs, ["val_loss", "accuracy", "lr"])
    assert [(panel.title, [line.column for line in panel.lines]) for panel in panels] == [
        ("val_loss", ["val_loss"]),
        ("accuracy", ["accuracy", "val_accuracy"]),
        ("lr", ["lr"]),
    ]
    assert [line.train for panel in panels for line in panel.lines] == [False, True, False, False]


# --- in a terminal ----------------------------------------------------------------------------------------------------


def test_a_text_plot_of_a_known_line() -> None:
    (panel,) = make_panels([a_run("one", *(float(n) for n in range(1, 23)))])
    title, *curve, foot = text_of(panel, width=24, height=3)
    assert title == "loss"
    assert [line[:13] for line in curve] == ["         22 ┤", "       11.5 ┤", "          1 ┤"]
    drawn = [line[13:] for line in curve]
    assert drawn[0][-1] == "a", "the run's letter is at the end of its line"
    heights = [next(row for row in range(3) if drawn[row][column] != " ") for column in range(11)]
    assert heights == sorted(heights, reverse=True)
    assert set(heights) == {0, 1, 2}
    assert foot.split() == ["1", "epoch", "22"]


@given(
    st.lists(st.lists(st.floats(), min_size=1, max_size=30), min_size=1, max_size=4),
    st.booleans(),
    st.integers(1, 250),
    st.integers(1, 30),
    st.booleans(),
)
def test_a_text_plot_takes_any_numbers_and_fits(
    values: list[list[float]], log: bool, width: int, height: int, braille: bool
) -> None:
    (panel,) = make_panels([a_run(f"r{n}", *row) for n, row in enumerate(values)])
    lines = text_of(panel, log=log, width=width, height=height, braille=braille)
    curve = [line for line in lines if "┤" in line]
    assert len(curve) in (0, height)
    assert all(cell_len(line) <= max(width, 23) for line in curve)
    if curve and braille:
        letters = {
            f"{chr(ord('a') + n)}"
            for n, row in enumerate(values)
            if any(math.isfinite(y) and (y > 0 or not log) for y in row)
        }
        assert letters & set("".join(line[13:] for line in curve)), "at least the letter that lies on top is seen"


def test_the_legend_names_each_run_once() -> None:
    panels = make_panels([a_run("one", 1.0, 2.0), a_run("two", 2.0)])
    words = "".join(text for text, _ in legend(panels[0].lines))
    assert words.split() == ["a", "one", "b", "two"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(dtrain: Dtrain) -> Dtrain:
    aged(make_run(dtrain.folder / "runs/old", rows(30)), 1000)
    aged(make_run(dtrain.folder / "runs/new", rows(5, 2)), 2000)
    return dtrain


def test_pictures_of_each_kind(two: Dtrain) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("b.SVG", b"<?xml"), ("c.pdf", b"%PDF")):
        (two.folder / name).write_text("an older one")
        done = two("plot", "old", "new", "-o", name, "--x", "time", "--log")
        assert (done.code, done.out, done.err) == (0, f"plot: {name}\n", "")
        assert (two.folder / name).read_bytes().startswith(start)
    assert not list(two.folder.glob(".*"))


def test_in_a_pipe_it_is_text_without_colours(two: Dtrain) -> None:
    done = two("plot")
    assert done.code == 0, done.text
    assert "\x1b" not in done.out
    assert done.out.splitlines()[-1].split() == ["a", "new"]
    assert "⠤" in done.out
    plain = two("plot", "old", PYTHONIOENCODING="ascii")
    assert plain.code == 0, plain.text
    assert plain.out.isascii()
    assert "*" in plain.out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_it_has_colours_and_fits(two: Dtrain, width: int) -> None:
    text = on_a_terminal(two, width, "plot", "old", "new", "--metric", "loss")
    assert "\x1b[36m" in text
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert max(map(cell_len, lines)) <= width
    assert lines[0] == "loss"


def test_a_history_on_a_terminal_fits(two: Dtrain) -> None:
    for width in (40, 80):
        text = on_a_terminal(two, width, "history", "old")
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
        table = [line for line in lines if line.startswith(("   ", "*  "))]
        assert max(map(cell_len, table)) <= width
        assert len(table) == 18, "a head, four rows, a gap, and twelve, the best among them"
        assert "11 of 30 epochs" in text or "of 30 epochs not shown (--all)" in text


def on_a_terminal(dtrain: Dtrain, width: int, *words: str) -> str:
    """What a command prints on a terminal of this width."""
    ours, theirs = pty.openpty()
    env = clean_environment(COLUMNS=str(width), LINES="40", TERM="xterm-256color")
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [str(BIN / "dtrain"), *words], cwd=dtrain.folder, env=env, stdin=subprocess.DEVNULL, stdout=theirs
    )
    os.close(theirs)
    found = b""
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                found += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return found.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["old", "-o", "a.gif"], "-o a.gif: should end in .png, .svg, .pdf."),
        (["old", "-o", "nowhere/a.png"], "-o nowhere/a.png: no such folder: nowhere."),
        (["old", "--metric", "f1"], "--metric f1: no run has this column."),
        (["empty"], "nothing to plot yet: no epochs in runs/empty."),
    ],
)
def test_what_cannot_be_is_one_message(two: Dtrain, words: list[str], told: str) -> None:
    make_run(two.folder / "runs/empty")
    done = two("plot", *words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert len(done.err.splitlines()) == 1


# --- curves that coincide ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [3, 40])
def test_each_of_several_curves_that_coincide_is_seen(epochs: int) -> None:
    values = [1 / epoch for epoch in range(1, epochs + 1)]
    runs = [a_run(name, *values) for name in ("a", "b", "c")] + [a_run("other", *(v + 1 for v in values))]
    (panel,) = make_panels(runs)
    figure = draw([panel], x="epoch", log=False)
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == epochs]
    np.testing.assert_array_equal([line.get_ydata() for line in curves[:3]], [values] * 3)  # nothing is moved
    image = picture([panel], x="epoch", log=False, kind="png")
    seen = [pixels(image, colour) for colour in COLOURS[:4]]
    assert min(seen[:3]) > 0.15 * sum(seen[:3])
    assert curves[3].get_linestyle() == "-", "one that has nothing to do with them is drawn as ever"


def test_a_training_curve_on_its_validation_s_is_seen() -> None:
    texts = tuple((str(n), repr(1 / n), repr(1 / n)) for n in range(1, 13))
    (panel,) = make_panels([Run("a", Path("a"), ("epoch", "loss", "val_loss"), texts)])
    image = picture([panel], x="epoch", log=False, kind="png")
    assert pixels(image, "#bfdbeb") > 200  # COLOURS[0], three quarters of the way to white


def test_letters_of_curves_that_coincide_stand_side_by_side() -> None:
    (panel,) = make_panels([a_run(name, 3, 2, 1) for name in ("x", "y", "z")])
    assert any(line.rstrip().endswith("cba") for line in text_of(panel))
    colours = {
        colour
        for line in text_panel(panel, PlotStyle("epoch", False, 60))
        for text, colour in line
        if "⠒" in text or "⠤" in text or "⢄" in text
    }
    assert len(colours - {None}) == 3
