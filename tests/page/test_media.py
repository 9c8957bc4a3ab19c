"""Images, histograms, texts and files of a run's hooks, as the page shows them in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import Browser
from helpers.commands import Dtrain
from helpers.runs import make_run, rows

from dtrain.callbacks.media import RunMedia
from dtrain.layout import MEDIA
from dtrain.report.data import page_data
from dtrain.report.finding import find_runs
from dtrain.report.media import media_data
from dtrain.report.runs import read_run
from dtrain.report.site import Site
from dtrain.rundir.media import Entry, MediaFolder, read_media

Open = Callable[..., Browser]
BAD = "<img src=x onerror=window.harmed=1>"


def kept(folder: Path, epochs: int = 3) -> Path:
    run = make_run(folder, rows(epochs))
    media = RunMedia(run, 0, None)
    for epoch in range(1, epochs + 1):
        at: dict[str, Any] = {"epoch": epoch, "step": epoch * 10}
        media.add("image", f"a {BAD}", np.full((4, 8), epoch * 5, np.uint8), **at)
        media.add("histogram", "weights", np.arange(epoch * 5), **at)
        media.add("text", "note", f"{BAD} of epoch {epoch}", **at)
    media.add("file", "config.yaml", Path(__file__), epoch=epochs, step=epochs * 10)
    return run


@pytest.fixture
def runs(dtrain: Dtrain) -> Path:
    for name in ("one", "two"):
        kept(dtrain.folder / "runs" / name)
    make_run(dtrain.folder / "runs/none", rows(2))
    return dtrain.folder / "runs"


def figure(run: str, name: str) -> str:
    return f'.medium[data-run="{run}"][data-name="{name}"]'


def test_each_epoch_can_be_looked_at_and_nothing_of_a_run_is_markup(runs: Path, page: Open) -> None:
    browser = page()
    assert len(browser.texts(".medium")) == 8
    assert browser.texts(f"{figure('one', 'note')} pre") == [f"{BAD} of epoch 3"]
    image = "const i = document.querySelector('.medium[data-run=two] img'); return [i.naturalWidth, i.naturalHeight]"
    assert browser.run(image) == [8, 4]
    bars = "return [...document.querySelectorAll('.medium[data-run=one] rect')].filter(r => r.getAttribute('height') > 0).length"
    assert browser.run(bars) == 15
    moved = """const s = document.querySelector('.medium[data-run=one][data-name=note] input');
    s.value = 0; s.dispatchEvent(new Event('input')); return 1"""
    browser.run(moved)
    assert browser.texts(f"{figure('one', 'note')} pre") == [f"{BAD} of epoch 1"]
    assert "epoch 1, step 10" in browser.texts(figure("one", "note"))[0]
    browser.one('#run-chips [data-name="two"]').click()
    assert len(browser.texts(".medium")) == 4, "those of a hidden run go"
    assert browser.texts(f"{figure('one', 'note')} pre") == [f"{BAD} of epoch 1"], (
        "and those of others stay as they were"
    )
    assert browser.run("return window.harmed === undefined")
    assert len(browser.requests()) == 1


def test_without_any_there_is_no_such_part(runs: Path, page: Open) -> None:
    browser = page("none")
    assert browser.run("return document.getElementById('media-section').hidden")


def test_a_page_holds_a_bounded_part_with_the_first_and_the_last(tmp_path: Path) -> None:
    run = kept(tmp_path / "long", 40)
    draw = np.random.default_rng(0)
    media = RunMedia(run, 400, None)
    for epoch in range(1, 13):
        noise = draw.integers(0, 256, (400, 500, 3), dtype=np.uint8)  # 600 kB that nothing compresses
        media.add("image", "noise", noise, epoch=epoch, step=epoch)
    found = {series["name"]: series for series in media_data(run)}
    assert found["note"]["all"] == 40
    epochs = [moment["epoch"] for moment in found["note"]["moments"]]
    assert (len(epochs), epochs[0], epochs[-1]) == (12, 1, 40)
    noise = found["noise"]["moments"]
    there = ["image" in moment for moment in noise]
    assert there == sorted(there), "the last ones are shown"
    assert 3 <= sum(there) < 12
    assert sum(len(moment.get("image", "")) for moment in noise) < 6 << 20
    assert noise[0]["missing"] == "too large for this page"


@pytest.mark.parametrize("damage", ["gone", "link", "html", "bounds"])
def test_what_is_damaged_or_planted_is_named(tmp_path: Path, damage: str) -> None:
    run = make_run(tmp_path / "run", rows(2))
    (tmp_path / "secret").write_text("a secret")
    RunMedia(run, 0, None).add("image", "x", np.zeros((2, 2), np.uint8), epoch=1, step=1)
    file = run / MEDIA / read_media(run)[0].file
    if damage == "bounds":
        MediaFolder(run, 9).add(Entry("histogram", "x", 1, 1, counts=(1, 2), edges=(0.0, float("inf"))))
    else:
        file.unlink()
    if damage == "link":
        file.symlink_to(tmp_path / "secret")
    if damage == "html":
        file.write_text("<script>")
    shown = media_data(run)
    assert all("missing" in moment for moment in shown[-1]["moments"])
    assert "secret" not in str([moment.get("image") for moment in shown[0]["moments"]])


def test_all_runs_together_have_a_bounded_part_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)  # 40 kB that nothing compresses
    for name in ("a", "b", "c"):
        run = make_run(tmp_path / name, rows(2))
        RunMedia(run, 0, None).add("image", "noise", noise, epoch=1, step=1)
    monkeypatch.setattr("dtrain.report.data.MOST_OF_PAGE", 120_000)
    monkeypatch.setattr("dtrain.report.site.MOST_OF_PAGE", 120_000)
    runs = [read_run(place) for place in find_runs([], tmp_path)]
    static = page_data(runs, live=False)["runs"]
    parts, _ = Site([], tmp_path).data()
    for found in (static, json.loads(b"".join(parts or []))["runs"]):
        shown = ["image" in run["media"][0]["moments"][0] for run in found]
        assert shown == [True, True, False]
