"""The notebook's view: its table and curves, how often it is updated, and what comes from ranks of another process."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import IPython
import IPython.display
import pytest
from helpers.clock import Now, stopped

from dtrain.api.fit_forms import shown
from dtrain.callbacks.progress import PassFacts, PlainLines, RunFacts, choose, choose_progress, notebook, paced
from dtrain.callbacks.progress.curve import curves_svg
from dtrain.callbacks.progress.feed import FeedReader, FeedWriter, fed
from dtrain.callbacks.progress.notebook import NotebookView, table_html
from dtrain.engine.callback import EngineCallback
from dtrain.errors import UsageError


def row(epoch: int, **more: Any) -> dict[str, Any]:
    values = {"loss": 1 / epoch, "acc": 1 - 1 / epoch, "val_loss": 2 / epoch, "val_acc": 0.5}
    return {"epoch": epoch, **values, "lr": 0.001, "seconds": 1.5, "samples_per_second": 100.0, **more}


class Table:
    steps = 0

    def running(self) -> dict[str, float]:
        return {"loss": 0.25}


# --- the table ------------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", line) for line in text.split("<tr>")[1:]]


def test_the_table_has_the_history() -> None:
    head, first, second = cells(table_html([row(1), row(2, loss=math.nan, acc=None)]))
    assert head == list(row(1))
    assert first == ["1", "1", "0", "2", "0.5", "0.001", "1.5", "100"]
    assert second[:3] == ["2", "nan", ""]


def test_of_a_long_run_the_first_and_the_last() -> None:
    lines = cells(table_html([row(epoch) for epoch in range(1, 101)]))[1:]
    assert [line[0] for line in lines] == [*map(str, range(1, 11)), "... 80 more ...", *map(str, range(91, 101))]


def test_names_are_text_and_no_markup() -> None:
    text = table_html([{"epoch": 1, "<b>": 1.0}]) + curves_svg([{"epoch": 1, "<b>": 1.0}])
    assert "<b>" not in text
    assert "&lt;b&gt;" in text


# --- the curves -----------------------------------------------------------------------------------------


def curves(text: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'points="([^"]*)"', text)
    return [[tuple(map(float, point.split(","))) for point in one.split()] for one in found]  # type: ignore[misc]


def test_curves_are_where_the_values_are() -> None:
    drawn = curves(curves_svg([row(1), row(2), row(4)]))
    assert len(drawn) == 4  # two metrics, train and valid
    loss = drawn[0]
    (x1, y1), (x2, y2), (x4, y4) = loss
    assert (x2 - x1) / (x4 - x1) == pytest.approx(1 / 3, abs=0.01)  # epochs 1, 2 and 4
    assert (y2 - y1) / (y4 - y1) == pytest.approx((1 - 1 / 2) / (1 - 1 / 4), abs=0.01)
    assert y1 < y4  # less is lower
    assert drawn[1][0][1] < y1  # val_loss is twice as much


def test_what_is_no_number_leaves_a_gap() -> None:
    rows = [row(1), row(2), row(3, loss=math.nan), row(4), row(5, loss=math.inf), row(6), row(7)]
    text = curves_svg(rows)
    assert [len(curve) for curve in curves(text)][:2] == [2, 2]  # 1 to 2 and 6 to 7
    assert text.count("<circle") == 1  # 4, which has no neighbour
    assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize("rows", [[], [{"epoch": 1, "lr": 0.1}]])
def test_without_metrics_there_is_no_picture(rows: list[dict[str, Any]]) -> None:
    assert curves_svg(rows) == ""


@pytest.mark.parametrize("rows", [[row(1)], [row(1, loss=math.nan, val_loss=None)], [row(1, loss=2.0, val_loss=2.0)]])
def test_one_epoch_constants_and_nothing_but_nan_are_drawn_too(rows: list[dict[str, Any]]) -> None:
    text = curves_svg(rows)
    assert text.startswith("<svg")
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_long_run_is_thinned_out_and_its_last_epoch_kept() -> None:
    drawn = curves(curves_svg([row(epoch) for epoch in range(1, 5001)]))
    assert 350 <= len(drawn[0]) <= 400
    assert drawn[0][-1][0] == pytest.approx(308)


# --- updates --------------------------------------------------------------------------------------------


class Handle:
    def __init__(self, pages: list[dict[str, str]]) -> None:
        self._pages = pages

    def update(self, page: dict[str, str], raw: bool) -> None:
        self._pages.append(page)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    return stopped(monkeypatch, notebook, paced)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What is displayed, the newest last."""
    found: list[dict[str, str]] = []

    def display(page: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert not found
        found.append(page)
        return Handle(found)

    monkeypatch.setattr(IPython.display, "display", display)
    return found


def test_one_output_is_updated_twice_a_second_and_stays(now: Now, pages: list[dict[str, str]]) -> None:
    view, table = NotebookView(), Table()
    for epoch in range(1, 11):
        run = RunFacts(10, 1, lambda: 0.001)
        view.on_pass_start(PassFacts("train", epoch, 1000, run=run))
        for step in range(1, 1001):
            now.seconds += 0.001
            table.steps = step
            view.on_progress(table)  # type: ignore[arg-type]
        view.on_epoch_end(row(epoch))
    assert 15 <= len(pages) <= 21  # in 10 s
    middle = pages[len(pages) // 2]["text/html"]
    assert re.search(r'<progress max="1000" value="\d+"', middle)
    assert re.search(r"epoch \d/10, train \d+/1000 · loss: 0.25 · lr 0.001 · \d:\d\d left", middle)
    view.close()
    assert len(cells(pages[-1]["text/html"].split("<svg")[0])) == 11
    assert "<progress" not in pages[-1]["text/html"]
    assert pages[-1]["text/plain"].splitlines()[-1].startswith("EPOCH = 10, loss = 0.1, ")


def test_one_that_fails_in_its_first_epoch_shows_how_far_it_came(now: Now, pages: list[dict[str, str]]) -> None:
    view = NotebookView()
    view.on_pass_start(PassFacts("train", 1, 10))
    view.close()
    assert "train 0/10" in pages[-1]["text/html"]


# --- ranks of another process -----------------------------------------------------------------------------


class Noted(EngineCallback):
    """Notes what it is told, with what it could ask for then."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.closed = 0

    def on_pass_start(self, facts: PassFacts) -> None:
        self.facts = facts
        known = (facts.split, facts.epoch, facts.steps, facts.skipped, facts.epochs, facts.run.ranks)
        self.told.append((*known, facts.samples(), facts.lr()))

    def on_progress(self, table: Any) -> None:
        self.told.append((table.steps, table.running(), self.facts.samples(), self.facts.lr()))

    def on_epoch_end(self, row: Any) -> None:
        self.told.append(row)

    def close(self) -> None:
        self.closed += 1


def test_what_a_rank_tells_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, path, table, samples = Noted(), tmp_path / "feed", Table(), [40]
    writer, reader = FeedWriter(path), FeedReader(path, shown)
    reader.poll()  # before there is anything
    writer.on_pass_start(PassFacts("train", 2, None, 4, 1.5, lambda: samples[0], RunFacts(3, 2, lambda: 0.01)))
    reader.poll()
    table.steps, samples[0] = 5, 50
    writer.on_progress(table)  # type: ignore[arg-type]
    writer.on_progress(table)  # type: ignore[arg-type]  # too soon to be told
    writer.on_epoch_end(row(2, loss=0.1 + 0.2, acc=math.inf))
    with path.open("a") as file:
        file.write('{"what": "end_')  # the next line is on its way
    reader.poll()
    reader.poll()
    assert shown.told == [
        ("train", 2, None, 4, 3, 2, 40, 0.01),
        (5, {"loss": 0.25}, 50, 0.01),
        row(2, loss=0.1 + 0.2, acc=math.inf),
    ]


def test_ranks_print_their_lines_where_there_is_nothing_better(capsys: Any) -> None:
    assert isinstance(choose_progress(is_main=True, log_step_freq=1), PlainLines)
    for verbose in (True, False, Noted()):
        with fed(verbose, log_step_freq=1) as found:
            assert found == (verbose, None)


def test_a_view_without_curves_is_this_process_s_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.api.fit_forms.can_display", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    view = shown(True, False, None)
    with fed(view, log_step_freq=1) as (writer, poll):
        writer.on_epoch_end(row(1, loss=0.5))  # type: ignore[union-attr]
        writer.on_epoch_end(row(2, loss=0.25))  # type: ignore[union-attr]
        assert poll is not None
    assert isinstance(view, NotebookView)
    assert len(view._rows) == 2 and view._curves == ""
    assert shown(True, True, None) is True and shown(True, None, True) is False
    for given in ((False, True, None), (view, None, True), (True, "yes", None)):
        with pytest.raises(UsageError, match=r"pass only one|should be True or False"):
            shown(*given)


def test_what_came_before_a_failure_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Noted()
    monkeypatch.setattr("dtrain.callbacks.progress.feed.choose_progress", lambda **_: shown)
    with pytest.raises(OSError, match="a rank failed"), fed(True, log_step_freq=1) as (writer, _):
        writer.on_epoch_end(row(1))  # type: ignore[union-attr]
        raise OSError("a rank failed")
    assert (shown.told, shown.closed) == ([row(1)], 1)


# --- where it is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pid", "is_one"), [(os.getpid(), True), (1, False), (None, False)], ids=["own", "another's", "none"]
)
def test_a_process_that_was_forked_off_a_notebook_is_none(
    monkeypatch: pytest.MonkeyPatch, pid: int | None, is_one: bool
) -> None:
    class Thing:
        def __init__(self, **what: Any) -> None:
            vars(self).update(what)

    shell = Thing(kernel=Thing(session=Thing(pid=pid))) if pid is not None else Thing()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert choose.can_display() is is_one
    kind = NotebookView if is_one else PlainLines
    assert type(choose_progress(is_main=True, log_step_freq=1)) is kind
