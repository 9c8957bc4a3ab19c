"""A run whose files are damaged is shown as damaged, with the cause; it hides no other and hangs nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import make_run, rows
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dtrain.report.compare import as_plain, compare
from dtrain.report.curves import make_panels
from dtrain.report.data import page_data, run_data
from dtrain.report.finding import changed, find_runs, links_out, words_on_links
from dtrain.report.progress import read_progress
from dtrain.report.render import render
from dtrain.report.runs import DAMAGED, read_run
from dtrain.report.tables import about, comparison_grid, damage_lines, history_grid, listing_grid
from dtrain.rundir.cells import parse_table
from dtrain.rundir.history import History, read_history, read_table

GOOD = "epoch,loss,val_loss,seconds\n1,1.0,1.0,1\n2,0.5,0.4,1\n"


def bomb() -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(lines)


# Which file holds what, and what is said of it; none where the run is none the worse for it.
CASES: dict[str, tuple[str, Any, str]] = {
    "a field of 200 kB": ("history.csv", 'epoch,loss\n1,"' + "x" * 200_000 + '"\n2,1.0\n', "line 2 cannot be read"),
    "an open quote": ("history.csv", 'epoch,loss\n1,"1.0\n2,0.5\n', "line 2 has a quote that is not closed"),
    "semicolons": ("history.csv", "epoch;loss\n1;1.0\n2;0.5\n", "separated by semicolons"),
    "latin-1": ("history.csv", GOOD.encode() + b"3,\xe4,1,1\n", "line 4 has bytes that are not UTF-8"),
    "binary": ("history.csv", bytes(range(256)) * 9, "not UTF-8"),
    "a cell too many": ("history.csv", "epoch,loss\n1,1.0,2.0\n", "line 2 has 3 cells for 2 columns"),
    "many columns": ("history.csv", ",".join(["epoch", *(f"c{i}" for i in range(20_000))]) + "\n1\n", ""),
    "a great many": (
        "history.csv",
        "epoch," * 60_000 + "x\n" + "1," * 60_000 + "1\n",
        "60,001 columns, of which 50,000",
    ),
    "huge numbers": ("history.csv", "epoch,loss\n1," + "9" * 6000 + "\n" + "9" * 400 + ",1\n1e400,2\n", ""),
    "a mark and other line ends": ("history.csv", b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(), ""),
    "a bomb": ("config.yaml", bomb(), "more than 100,000 values"),
    "a deep list": ("config.yaml", "a: " + "[" * 5000 + "]" * 5000, "nested more than 64 levels deep"),
    "itself": ("config.yaml", "a: &x {b: *x}\n", "line 1: *x refers to itself"),
    "no mapping": ("config.yaml", "[1, 2]\n", "not a mapping of sections"),
    "a large config": ("config.yaml", "a: " + "x" * (1 << 20), "larger than the limit of 1,048,576 bytes"),
    "base 60": (
        "config.yaml",
        "train: {epochs: 1" + ":59" * 20_000 + "}\n",
        "line 1: a number has more than 1,000 digits",
    ),
    "a huge integer": ("config.yaml", "train: {epochs: " + "9" * 5000 + "}\n", "config.yaml: "),
    "odd kinds": ("config.yaml", "train: {epochs: 2001-01-01}\ncheckpoint: {monitor: {a: 1}, mode: [min]}\n", ""),
    "a config of bytes": ("config.yaml", b"\x00\xff" * 50, "config.yaml: it is not UTF-8 text"),
    "deep JSON": ("failure.json", "[" * 200_000, "failure.json: it is nested too deeply"),
    "another kind of JSON": ("failure.json", "[1]", "failure.json: it contains no failure report"),
    "odd failures": ("failure.json", json.dumps({"others": [1], "exception": [1], "rank": {"a": 1}, "at": "x"}), ""),
    "deep starts": (
        "starts.jsonl",
        '{"event":"start","at":1,"x":' + "[" * 100_000 + "\n",
        "line 1 is nested too deeply",
    ),
    "odd starts": ("starts.jsonl", '{"event":"start","at":1' + "0" * 400 + "}\n" + '{"event":"start","at":NaN}\n', ""),
    "odd epochs": ("starts.jsonl", '{"event":"start","at":1,"epoch":1' + "0" * 400 + "}\n", ""),
    "deep jobs": ("slurm/job.json", "[" * 200_000, "slurm/job.json"),
    "odd jobs": ("slurm/job.json", json.dumps({"job": "1", "incarnations": [{"restart": 0}]}), "not a job record"),
    "odd owners": (
        "owner.lock",
        '{"host":1,"pid":"../1","started":"x","machine":5,"job":[],"since":"z","token":3}',
        "",
    ),
}
KINDS = ("folder", "fifo", "loop", "link")
FILES = ("history.csv", "config.yaml", "failure.json", "starts.jsonl", "slurm/job.json", "owner.lock")


def everything(runs: Path) -> tuple[list[Any], str]:
    """Reads all runs and shows them in each way; returns them and the page."""
    found = [read_run(place) for place in find_runs([], runs)]
    listing_grid(found, [changed(run.folder) for run in found], None, None).lines()
    comparison_grid(compare(found)).lines()
    json.dumps(as_plain(compare(found), rows=True), allow_nan=False)
    for run in found:
        about(run)
        read_progress(run.folder)
        if run.cells:
            history_grid(run, metric=None, mode=None, width=100).lines()
    make_panels(found)
    return found, render(page_data(found, live=False))


def good_and_bad(folder: Path, break_it: Callable[[Path], None]) -> tuple[Any, str]:
    """A good run beside one that is broken; returns the broken one and the page, and checks the good one."""
    make_run(folder / "runs/good", rows(3))
    bad = make_run(folder / "runs/bad")
    (bad / "history.csv").write_text(GOOD)
    break_it(bad)
    found, page = everything(folder / "runs")
    by_name = {run.name: run for run in found}
    assert set(by_name) == {"good", "bad"}
    assert len(by_name["good"].cells) == 3
    assert by_name["good"].damage == ()
    return by_name["bad"], page


def written(bad: Path, name: str, content: str | bytes) -> None:
    (bad / name).parent.mkdir(exist_ok=True)
    (bad / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_holds(tmp_path: Path, case: str) -> None:
    name, content, words = CASES[case]
    bad, page = good_and_bad(tmp_path, lambda bad: written(bad, name, content))
    assert (bad.state == DAMAGED) == bool(words)
    assert words in "; ".join(bad.damage)
    if words:
        assert damage_lines([bad]) == [f"bad is damaged: {'; '.join(bad.damage)}"]
        assert run_data(bad)["damage"] == list(bad.damage)
    else:
        assert bad.damage == ()
    assert '"name":"good"' in page


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_stands_in_a_files_place(tmp_path: Path, name: str, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("epoch,hush\n1,4711\n")

    def planted(bad: Path) -> None:
        path = bad / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(secret if kind == "link" else path.name)

    bad, page = good_and_bad(tmp_path, planted)  # a pipe would be waited for until this test's time is over
    assert bad.state == DAMAGED
    assert f"{name}: " in "; ".join(bad.damage)
    assert "hush" not in page
    assert "4711" not in page


def test_links_that_lead_out_are_left_out_and_named(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/good", rows(3))
    make_run(tmp_path / "disk/far", rows(3, seed=5))
    runs = tmp_path / "runs"
    (runs / "latest").symlink_to("good")
    (runs / "etc").symlink_to("/etc")
    (runs / "far").symlink_to(tmp_path / "disk/far")
    (runs / "loop").symlink_to("loop")
    (runs / "gone").symlink_to("nowhere")
    found, page = everything(runs)
    assert len(found) == 1  # and latest is the same one
    assert links_out(runs) == ["far"]
    assert words_on_links(runs) == [
        f"skipped, since the link points outside of {runs}: far; name it to show it, as in {runs}/far"
    ]
    assert "root:" not in page
    assert str(tmp_path / "disk") not in page
    assert [place.name for place in find_runs([str(runs / "far")], runs)] == ["far"]
    assert len(read_run(find_runs(["far"], runs)[0]).cells) == 3
    (tmp_path / "all").symlink_to(runs)  # the folder of runs itself may be one
    assert len(everything(tmp_path / "all")[0]) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), data=st.binary(max_size=300) | st.text(max_size=300).map(lambda t: t.encode()))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    good_and_bad(folder, lambda bad: written(bad, name, data))


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
NAMES = st.lists(
    st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1), min_size=1, max_size=5, unique=True
)


@example(names=[";"], values=[[1.0] * 5], crlf=False)
@given(names=NAMES, values=st.lists(st.lists(NUMBERS, min_size=5, max_size=5), max_size=5), crlf=st.booleans())
def test_what_is_written_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], values: list[list[float]], crlf: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "history.csv"
    history = History(path)
    for row in values:
        history.append(dict(zip(names, row, strict=False)))
    if not values:
        return
    data = path.read_bytes()
    table = parse_table(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n") if crlf else data)
    assert table.columns == names
    assert table.rows == [[str(value) for value in row[: len(names)]] for row in values]
    assert table.faults == []


class TestHistoryThatIsChangedMeanwhile:
    """While the run that writes it goes on, and before it is resumed."""

    ROWS = rows(6)

    def started(self, folder: Path, count: int = 3) -> History:
        history = History(folder / "history.csv")
        for row in self.ROWS[:count]:
            history.append(row)
        return history

    def check(self, folder: Path, history: History, *, aside: bool) -> None:
        for row in self.ROWS[len(history.rows) :]:
            history.append(row)
        history.sync()
        table = read_table(folder / "history.csv")
        assert [[float(cell) for cell in row] for row in table.rows] == [list(row.values()) for row in self.ROWS]
        assert table.faults == []
        assert (folder / "history-1.csv").exists() == aside

    @pytest.mark.parametrize(
        "how", ["removed", "replaced by the same", "edited", "cut", "longer", "folder", "fifo", "link"]
    )
    def test_it_is_whole_again_with_the_next_row(
        self, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        history, path = self.started(tmp_path), tmp_path / "history.csv"
        text = path.read_text()
        path.unlink()
        victim = tmp_path / "victim"
        victim.write_text("mine")
        if how == "replaced by the same":
            path.write_text(text)
        elif how == "edited":
            path.write_text(text.replace("\n1,", "\n7,"))
        elif how == "cut":
            path.write_text(text[:-20])
        elif how == "longer":
            path.write_text(text + "by hand\n")
        elif how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
        elif how == "link":
            path.symlink_to(victim)
        self.check(tmp_path, history, aside=how not in ("removed", "replaced by the same"))
        assert victim.read_text() == "mine"
        assert bool(caplog.records) == (how != "replaced by the same")
        if how == "longer":
            assert (tmp_path / "history-1.csv").read_text() == text + "by hand\n"

    def test_a_change_of_the_working_directory_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").mkdir()
        monkeypatch.chdir(tmp_path)
        history = History("history.csv")
        history.append(self.ROWS[0])
        monkeypatch.chdir(tmp_path / "a")
        self.check(tmp_path, history, aside=False)
        assert list((tmp_path / "a").iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "aside"),
        [
            (lambda text: text, False),
            (lambda text: text[:-30], False),  # torn by a kill
            (lambda text: "", False),
            (lambda text: "\N{ZERO WIDTH NO-BREAK SPACE}" + text.replace("\n", "\r\n"), False),
            (lambda text: text + "# my notes\n", True),
            (lambda text: text.replace("\n2,", "\n2,9"), True),
            (lambda text: text.replace(",", ";"), True),
            (lambda text: 'epoch,"lo\rss"\n1,1\n', True),
        ],
    )
    def test_a_resumed_run_has_its_rows_and_keeps_what_somebody_wrote(
        self, tmp_path: Path, change: Callable[[str], str], aside: bool
    ) -> None:
        self.started(tmp_path, 4)
        path = tmp_path / "history.csv"
        before = change(path.read_text())
        path.write_bytes(before.encode())
        history = History.resumed(path, self.ROWS[:2])
        assert len(read_history(tmp_path)) == 2
        self.check(tmp_path, history, aside=aside)
        if aside:
            assert (tmp_path / "history-1.csv").read_bytes() == before.encode()

    @pytest.mark.parametrize(
        ("change", "aside"),
        [
            (lambda text: text, False),
            (lambda text: text[:-3], False),  # torn by a kill
            (lambda text: text.replace("1,0.5,nan", "1,0.5,0.25"), True),
            (lambda text: text.replace("1,0.5,nan", "1,0.75,nan"), True),
            (lambda text: text.replace("val_f1", "loss"), True),
            (lambda text: text.replace("3,0.125,", "3,mine,"), True),
            (lambda text: "\n".join(text.split("\n")[:2]), True),  # somebody's, who has no line end at the end
            (lambda text: "notes", True),
        ],
    )
    def test_a_column_that_came_after_the_checkpoint_is_no_change_of_somebodys(
        self, tmp_path: Path, change: Callable[[str], str], aside: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Columns are compared by name, and a kill came between the late column's row and its checkpoint."""
        path = tmp_path / "history.csv"
        history = History(path)
        for epoch in (1, 2):
            history.append({"epoch": epoch, "loss": 0.5 / epoch, "lr": 0.1})
        kept = [dict(row) for row in history.rows]
        history.append({"epoch": 3, "loss": 0.125, "val_f1": 0.75, "lr": 0.1})
        path.write_text(change(path.read_text()))
        History.resumed(path, kept)
        assert path.read_text() == "epoch,loss,lr\n1,0.5,0.1\n2,0.25,0.1\n"
        assert ((tmp_path / "history-1.csv").exists(), "was modified" in caplog.text) == (aside, aside)
