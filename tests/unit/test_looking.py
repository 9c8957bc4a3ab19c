"""Which runs are meant, what is best in them, and how they compare: known answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers.runs import COLUMNS, a_start, aged, an_end, make_run, rows
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dtrain.errors import UsageError
from dtrain.layout import HISTORY
from dtrain.report.compare import as_plain, compare
from dtrain.report.finding import find_runs
from dtrain.report.runs import Run, read_run
from dtrain.report.tables import Grid, comparison_grid, history_grid, shortened
from dtrain.report.words import duration, printable, rounded
from dtrain.rundir.columns import metrics_of, mode_of, monitored, paired
from dtrain.rundir.history import History, read_history, read_table, value_of
from dtrain.rundir.lock import owned


def width_of(grid: Grid) -> int:
    """Of a table's widest line."""
    return max(map(cell_len, grid.lines()))


def read(folder: Path) -> Run:
    (place,) = find_runs([str(folder)], folder.parent)
    return read_run(place)


def of(tmp_path: Path, name: str, **columns: list[object]) -> Run:
    """A run with these columns."""
    made = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return read(make_run(tmp_path / name, made))


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns() -> None:
    assert metrics_of(COLUMNS) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert paired([*COLUMNS, "val_f1"]) == {
        "loss": ["loss", "val_loss"],
        "accuracy": ["accuracy", "val_accuracy"],
        "f1": ["val_f1"],
    }
    assert [monitored(names) for names in (COLUMNS, ["loss", "a"], ["a", "val_a"], ["a"], ["epoch", "lr"])] == [
        "val_loss",
        "loss",
        "val_a",
        "a",
        None,
    ]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *[
            (name, "min")
            for name in ("loss", "val_loss", "val_rmse", "token_error", "ppl", "box-loss", "val_cls_loss2")
        ],
        *[(name, "max") for name in ("accuracy", "val_f1", "auroc", "val_iou", "lossless", "merit", "metric")],
    ],
)
def test_which_end_is_best(name: str, mode: str) -> None:
    assert mode_of(name) == mode


# --- reading ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(), min_size=1, max_size=30), st.lists(st.integers(), min_size=1, max_size=30))
def test_a_number_comes_back_to_its_last_bit(
    tmp_path_factory: pytest.TempPathFactory, floats: list[float], whole: list[int]
) -> None:
    file = tmp_path_factory.mktemp("history") / HISTORY
    history = History(file)
    for x, n in zip(floats, whole, strict=False):
        history.append({"epoch": n, "loss": x})
    found = [[value_of(cell) for cell in row] for row in read_table(file).rows]
    for row, x, n in zip(found, floats, whole, strict=False):
        assert row[0] == n
        assert isinstance(row[1], float)
        assert row[1].hex() == x.hex()


@given(st.binary(max_size=400))
def test_reading_takes_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / HISTORY).write_bytes(data)
    run = read(folder)
    assert all(len(row) == len(run.columns) for row in run.cells)
    history_grid(run, metric=None, mode=None, width=80)
    json.dumps(as_plain(compare([run]), rows=True), allow_nan=False)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("", None),
        ("3", 3),
        ("-3", -3),
        ("0.1", 0.1),
        ("1e-05", 1e-5),
        ("inf", math.inf),
        ("a b", "a b"),
        ("1_0", "1_0"),
    ],
)
def test_a_cell(cell: str, value: object) -> None:
    assert value_of(cell) == value
    assert type(value_of(cell)) is type(value)


def test_a_torn_last_line_and_rows_of_other_widths(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows(2))
    with (folder / HISTORY).open("a") as file:
        file.write("3,0.5\n4,1,2,3,4,5,6,7,8,9\n5,0.12345")
    run = read(folder)
    assert run.epochs == [1, 2, 3, 4]
    assert run.numbers("accuracy")[2:] == [None, 2.0]
    assert run.seconds is None, "a row does not say how long it took"
    assert len(read_history(folder)) == 4


def test_a_history_with_words_in_it_is_read(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [{"epoch": 1, "loss": 0.5, "note": "warm-up"}, {"epoch": 2, "loss": 0.25, "note": ""}])
    frame = read_history(tmp_path / "run")
    assert frame["note"].tolist()[0] == "warm-up"
    assert frame["loss"].tolist() == [0.5, 0.25]


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for at, name in enumerate(("old", "new", "empty", "other/new")):
        aged(make_run(tmp_path / "runs" / name, rows(2) if name != "empty" else ()), 1000.0 + at)
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    (tmp_path / "plain.csv").write_text("epoch,loss\n1,0.5\n")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], ["empty", "new", "old"]),
        (["old"], ["old"]),
        (["runs/old"], ["old"]),
        (["runs/old/"], ["old"]),
        (["runs/old/history.csv"], ["old"]),
        (["plain.csv"], ["plain"]),
        (["runs"], ["empty", "new", "old"]),
        (["runs/other"], ["new"]),
        (["old", "runs/old", "new", "old"], ["old", "new"]),
        (["new", "runs/other/new", "old"], ["runs/new", "runs/other/new", "old"]),
    ],
)
def test_what_is_meant(runs: Path, names: list[str], found: list[str]) -> None:
    assert [place.name for place in find_runs(names, Path("runs"))] == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odl", "Did you mean 'old'?"),
        ("nothing", "Runs in runs: empty, new, old."),
        ("runs/no-run", "is neither a run's folder nor a folder of runs"),
    ],
)
def test_what_is_not_there(runs: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        find_runs([name], Path("runs"))
    assert name in str(raised.value)
    assert words in str(raised.value)


def test_a_run_in_the_current_folder_has_its_folders_name(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs / "old")
    assert [place.name for place in find_runs(["."], Path("runs"))] == ["old"]


# --- state and best ---------------------------------------------------------------------------------------------------

FAILURE = {"rank": 1, "cause": "exception", "exception": {"type": "ValueError", "message": "no"}}
THREE = {"train": {"epochs": 3}}


@pytest.mark.parametrize(
    ("epochs", "starts", "failure", "state"),
    [
        (0, [], None, "no rows"),
        (2, [], None, "ended"),
        (3, [], None, "complete"),
        (2, [], FAILURE, "failed"),
        (2, [a_start(1)], None, "killed"),
        (2, [a_start(1)], FAILURE, "failed"),
        (2, [a_start(1e12)], FAILURE, "killed"),  # the failure is an earlier start's
        (2, [a_start(1), an_end(2, "stopped")], None, "stopped"),
        (2, [a_start(1), an_end(2, "failed")], None, "failed"),
        (2, [a_start(1), an_end(2, "complete")], None, "complete"),  # stopped early
        (3, [a_start(1), a_start(2), an_end(3)], None, "complete"),
    ],
)
def test_the_state(tmp_path: Path, epochs: int, starts: list[dict[str, object]], failure: None, state: str) -> None:
    folder = make_run(tmp_path / "run", rows(epochs), config=THREE, starts=starts, failure=failure)
    assert read(folder).state == state
    with owned(folder):
        assert read(folder).state == "running"
    assert read(folder).state == state


@pytest.mark.parametrize(
    ("metric", "mode", "config", "best"),
    [
        (None, None, None, 2),
        ("loss", None, None, 3),
        ("acc", None, None, 1),
        ("acc", "min", None, 0),
        (None, None, {"checkpoint": {"monitor": "acc", "mode": "max"}}, 1),
        (None, None, {"checkpoint": {"monitor": "loss", "mode": "max"}}, 0),
        ("acc", None, {"checkpoint": {"monitor": "acc", "mode": "min"}}, 0),
        ("loss", None, {"checkpoint": {"monitor": "acc", "mode": "max"}}, 3),
        (None, None, {"checkpoint": {"monitor": "gone", "mode": "max"}}, 2),
        (None, None, {"checkpoint": 7}, 2),
        ("odd", None, None, None),
    ],
)
def test_the_best_epoch(tmp_path: Path, metric: str, mode: None, config: dict[str, object], best: int) -> None:
    losses, accuracies, valid = [0.9, 0.8, 0.7, 0.6], [0.1, 0.9, 0.9, 0.5], [math.nan, 0.5, 0.25, 0.25]
    table = zip(losses, accuracies, valid, [math.nan, math.inf, -math.inf, math.nan], strict=True)
    made = [
        dict(zip(("epoch", "loss", "acc", "val_loss", "odd"), (n, *row), strict=True)) for n, row in enumerate(table, 1)
    ]
    assert read(make_run(tmp_path / "run", made, config=config)).best(metric, mode) == best  # type: ignore[arg-type]


# --- comparing --------------------------------------------------------------------------------------------------------


def test_runs_side_by_side(tmp_path: Path) -> None:
    fast = of(tmp_path, "fast", epoch=[1, 2, 3, 4], val_loss=[0.9, 0.7, 0.8, 0.85], seconds=[1, 1, 1, 1])
    slow = of(tmp_path, "slow", epoch=[1, 2], val_loss=[0.5, 0.75], seconds=[1.5, 2.0])
    none = of(tmp_path, "none", epoch=[1, 2, 3], loss=[0.1, 0.1, 0.1], seconds=[9, 9, 9])
    bare = read(make_run(tmp_path / "bare"))
    found = compare([fast, slow, none, bare])
    assert (found.metric, found.mode, found.epoch, found.seconds) == ("val_loss", "min", 2, 3.5)
    points = [
        [p and (p.epoch, p.cell, p.seconds) for p in (one.final, one.best, one.at_epoch, one.at_time)]
        for one in found.runs
    ]
    assert points == [
        [(4, "0.85", 4.0), (2, "0.7", 2.0), (2, "0.7", 2.0), (3, "0.8", 3.0)],
        [(2, "0.75", 3.5), (1, "0.5", 1.5), (2, "0.75", 3.5), (2, "0.75", 3.5)],
        [None] * 4,
        [None] * 4,
    ]


def test_no_epoch_ended_within_the_time_that_all_have_had(tmp_path: Path) -> None:
    short = of(tmp_path, "short", epoch=[1], loss=[1.0], seconds=[0.5])
    long = of(tmp_path, "long", epoch=[1, 2], loss=[2.0, 1.0], seconds=[5.0, 5.0])
    assert [one.at_time and one.at_time.epoch for one in compare([short, long]).runs] == [1, None]


def test_runs_that_do_not_say_how_long_they_took(tmp_path: Path) -> None:
    one = of(tmp_path, "one", epoch=[1], loss=[1.0], seconds=[0.5])
    other = of(tmp_path, "other", epoch=[1], loss=[2.0])
    found = compare([one, other])
    assert found.seconds is None
    assert [each.at_time for each in found.runs] == [None, None]


def test_a_metric_that_no_run_has(tmp_path: Path) -> None:
    run = of(tmp_path, "one", epoch=[1], loss=[1.0], lr=[0.1])
    with pytest.raises(
        UsageError, match=r"--metric los: no such column. Did you mean 'loss'\? Columns: loss, epoch, lr"
    ):
        compare([run], "los")


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_long_history_is_shortened() -> None:
    assert shortened(20, 3) == list(range(20))
    assert shortened(500, 100) == [0, 1, 2, 3, 100, *range(488, 500)]
    assert shortened(500, None) == [0, 1, 2, 3, *range(488, 500)]


def test_a_narrow_terminal_misses_what_matters_least(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run", rows(30)))
    widths = {width: history_grid(run, metric=None, mode=None, width=width) for width in (120, 80, 60, 40, 10)}
    assert widths[120].head == ("", *COLUMNS)
    assert widths[80].head == ("", *COLUMNS[:7])
    assert widths[60].head == ("", *COLUMNS[:5])
    assert widths[40].head == ("", "epoch", "loss", "accuracy", "val_loss")
    assert widths[10].head == ("", "epoch", "val_loss")
    for width, grid in widths.items():
        assert width == 10 or width_of(grid) <= width
        left = [name for name in COLUMNS if name not in grid.head]
        told = [line for line in grid.under if line.startswith("columns not shown")]
        assert bool(told) == bool(left)
        assert all(name in told[0] for name in left)


@given(st.floats(-1e300, 1e300))
def test_rounding_never_shows_a_digit_that_is_not_the_values(x: float) -> None:
    shown = float(rounded(repr(x)))
    assert abs(shown - x) <= abs(x) * 0.5001e-3 + 5e-324


@given(st.text())
def test_no_text_commands_a_terminal(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.123, "0.12 s"), (42.4, "42 s"), (60, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_comparison_misses_its_spare_columns_where_it_is_narrow(tmp_path: Path) -> None:
    runs = [read(make_run(tmp_path / name, rows(4, seed))) for seed, name in enumerate(("one", "a" * 30))]
    grid = comparison_grid(compare(runs))
    spare = ("STARTS", "STATE", "EPOCHS")
    assert grid.fitted(None, spare) == grid.fitted(width_of(grid), spare) == grid
    narrow = grid.fitted(width_of(grid) - 1, spare)
    assert (narrow.head, narrow.under[-1]) == (
        tuple(n for n in grid.head if n != "STARTS"),
        "columns not shown: STARTS (--all)",
    )
    assert grid.fitted(10, spare).head == tuple(name for name in grid.head if name not in spare)
    assert [row[0] for row in grid.fitted(10, spare).rows] == ["one", "a" * 30]
