"""One history: the same values, to the last bit, in the DataFrame, the table, its JSON and CSV, the plot and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from pathlib import Path

import pandas as pd
from helpers.runs import cells
from hypothesis import example, given
from hypothesis import strategies as st
from pytest import TempPathFactory

from dtrain.cli.history import _csv
from dtrain.report.compare import as_plain, compare
from dtrain.report.curves import make_panels
from dtrain.report.data import page_data
from dtrain.report.finding import find_runs
from dtrain.report.runs import read_run
from dtrain.report.tables import history_grid
from dtrain.report.words import rounded
from dtrain.rundir.history import History, read_history

COLUMNS = ("epoch", "loss", "acc", "val_loss", "val_acc", "lr", "seconds", "samples_per_second")


def bits(value: object) -> bytes:
    """A number's bits; every NaN is the same one."""
    number = float(str(value))
    return b"nan" if math.isnan(number) else struct.pack("d", number)


@example([[1e308] * 7] * 2)  # the sum of its times is more than a number can be
@given(st.lists(st.lists(st.floats(), min_size=7, max_size=7), min_size=1, max_size=8))
def test_the_same_values_everywhere(tmp_path_factory: TempPathFactory, table: list[list[float]]) -> None:
    folder: Path = tmp_path_factory.mktemp("run")
    history = History(folder / "history.csv")
    for epoch, values in enumerate(table, 1):
        history.append(dict(zip(COLUMNS, (epoch, *values), strict=True)))
    known = cells(folder)
    assert [[bits(row[name]) for name in COLUMNS[1:]] for row in known] == [[bits(x) for x in row] for row in table]

    run = read_run(find_runs([str(folder)], folder)[0])
    frame: pd.DataFrame = read_history(folder)
    (told,) = json.loads(json.dumps(as_plain(compare([run]), rows=True), allow_nan=False))
    (shown,) = json.loads(json.dumps(page_data([run], live=False), allow_nan=False))["runs"]
    grid = history_grid(run, metric=None, mode=None, width=None)
    panels = {line.column: line for panel in make_panels([run], COLUMNS[1:]) for line in panel.lines}

    assert list(csv.DictReader(io.StringIO(_csv([run])))) == known
    for name in COLUMNS[1:]:
        wanted = [bits(row[name]) for row in known]
        assert [bits(x) for x in frame[name]] == wanted
        assert [bits(row[name]) for row in told["rows"]] == wanted
        assert shown["cells"][name] == [row[name] for row in known]
        assert [bits(y) for y in panels[name].ys] == wanted
        assert [row[1 + COLUMNS.index(name)] for row in grid.rows] == [rounded(row[name]) for row in known]
