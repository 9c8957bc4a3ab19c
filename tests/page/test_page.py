"""The page in a real browser: pointed at, clicked, typed into; its values are those of history.csv."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Browser
from helpers.commands import Dtrain
from helpers.pointing import SHIFT, drag, ends, hover, place, told, where
from helpers.runs import a_start, aged, an_end, cells, make_run, rows

Open = Callable[..., Browser]
BAD = "<img src=x onerror=window.harmed=1>"
TRACE = f"Traceback (most recent call last):\n</script>{BAD}\nValueError: labels should be in 0..9"


def config(**more: Any) -> dict[str, Any]:
    return {"recipe": "mine.py", "optimizer": {"lr": 0.001}, "train": {"epochs": 40, "seed": 1}} | more


@pytest.fixture
def runs(dtrain: Dtrain) -> Path:
    """Runs of all kinds: one that was started again, one with NaN, one epoch, none, other metrics."""
    folder = dtrain.folder / "runs"
    starts = [a_start(1e9), a_start(1e9 + 900, epoch=12), an_end(1e9 + 2000, epoch=40)]
    aged(make_run(folder / "base", rows(40), config=config(), starts=starts), 6000)
    odd = rows(30, 1)
    odd[20]["val_loss"], odd[10]["loss"], odd[29]["accuracy"] = float("nan"), float("inf"), ""
    failure = {
        "rank": 3,
        "host": "node7",
        "cause": "exception",
        "traceback": TRACE,
        "exception": {"type": "ValueError", "message": "no"},
    }
    starts = [a_start(1e9, host="node7", device="cuda:0", gpu="H100"), an_end(1e9 + 50, "failed")]
    aged(make_run(folder / "odd", odd, config=config(optimizer={"lr": 0.01}), starts=starts, failure=failure), 5000)
    aged(make_run(folder / "dot", rows(1, 2), config=config()), 4000)
    aged(make_run(folder / "empty", config=config()), 3000)
    other = [{"epoch": row["epoch"], "f1": row["accuracy"]} for row in rows(25, 3)]
    make_run(folder / "other", other)
    with (folder / "other/history.csv").open("a") as file:
        file.write("26,0.1")  # torn
    aged(folder / "other", 2000)
    return folder


def painted(browser: Browser, panel: str, run: str) -> int:
    """How many pixels of a panel have a run's colour."""
    script = """const chip = document.querySelector(`#run-chips [data-name="${arguments[1]}"] line`);
    const [r, g, b] = chip.getAttribute("stroke").match(/[0-9a-f]{2}/g).map((h) => parseInt(h, 16));
    const canvas = document.querySelector(`[data-panel="${arguments[0]}"] canvas`);
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let n = 0;
    for (let i = 0; i < data.length; i += 4)
        if (data[i + 3] > 200 && Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 12) n += 1;
    return n"""
    return int(browser.run(script, panel, run))


def chip(browser: Browser, name: str) -> Any:
    return browser.one(f'.chips [data-name="{name}"]')


def column(browser: Browser, number: int) -> list[str]:
    return browser.texts(f"#runs tbody tr > :nth-child({number})")


# --- values -----------------------------------------------------------------------------------------------------------


def test_the_page_has_the_very_values_and_no_error(runs: Path, page: Open) -> None:
    browser = page()
    data = json.loads(browser.texts("#data")[0])
    assert [run["name"] for run in data["runs"]] == ["base", "odd", "dot", "empty", "other"]
    for run in data["runs"]:
        if run["name"] == "empty":
            assert run["cells"] == {}
            continue
        known = [row for row in cells(runs / run["name"]) if (run["name"], row["epoch"]) != ("other", "26")]
        assert [dict(zip(run["cells"], row, strict=True)) for row in zip(*run["cells"].values(), strict=True)] == known
    assert column(browser, 2) == ["complete", "failed", "ended", "no rows", "ended"]
    assert browser.requests() == [(runs.parent / "report.html").as_uri()]


def test_pointing_at_a_curve_shows_what_the_history_has(runs: Path, page: Open) -> None:
    browser = page("base", "odd")
    known = {name: {row["epoch"]: row for row in cells(runs / name)} for name in ("base", "odd")}
    for panel, columns in (("loss", ("loss", "val_loss")), ("accuracy", ("accuracy", "val_accuracy"))):
        for epoch in (1, 11, 21, 30, 40):
            hover(browser, panel, (epoch - 1) / 39)
            assert where(browser, panel) == f"epoch {epoch}"
            assert told(browser, panel) == {
                name: {column: table[str(epoch)][column] or "–" for column in columns}
                for name, table in known.items()
                if str(epoch) in table
            }
    assert browser.texts('[data-panel="loss"] .said') == [
        "odd: loss is NaN or infinite in 1 epoch; odd: val_loss is NaN or infinite in 1 epoch"
    ]


def test_over_training_time_each_run_has_its_own_nearest_epoch(runs: Path, page: Open) -> None:
    browser = page("base", "odd")
    browser.run("const s = document.getElementById('x-axis'); s.value = 'time'; s.dispatchEvent(new Event('change'))")
    known = {name: cells(runs / name) for name in ("base", "odd")}
    ends = {
        name: [sum(float(row["seconds"]) for row in table[: n + 1]) for n in range(len(table))]
        for name, table in known.items()
    }
    hover(browser, "loss", 0.5)
    at = ends["base"][0] + 0.5 * (ends["base"][-1] - ends["base"][0])
    nearest = {name: min(range(len(times)), key=lambda n: abs(times[n] - at)) for name, times in ends.items()}
    found = told(browser, "loss")
    assert {name: known[name][row]["loss"] for name, row in nearest.items()} == {
        name: found[name]["loss"] for name in nearest
    }
    assert "of training" in where(browser, "loss")


# --- switches ---------------------------------------------------------------------------------------------------------


def test_a_run_is_switched_off_and_on(runs: Path, page: Open) -> None:
    browser = page("base", "odd")
    before = painted(browser, "loss", "base"), painted(browser, "loss", "odd")
    assert min(before) > 100
    chip(browser, "base").click()
    assert chip(browser, "base").get_attribute("aria-pressed") == "false"
    browser.until("return new Promise((done) => requestAnimationFrame(() => done(1)))")
    assert painted(browser, "loss", "base") == 0
    assert painted(browser, "loss", "odd") > 100
    hover(browser, "loss", 0.5)
    assert list(told(browser, "loss")) == ["odd"]
    chip(browser, "base").click()
    browser.until("return new Promise((done) => requestAnimationFrame(() => done(1)))")
    assert painted(browser, "loss", "base") > 100


def test_metrics_and_kinds_of_line_are_switched_off_and_on(runs: Path, page: Open) -> None:
    browser = page("base")
    assert browser.texts("figcaption") == ["loss", "accuracy", "samples_per_second"]
    chip(browser, "accuracy").click()
    chip(browser, "lr").click()
    assert browser.texts("figcaption") == ["loss", "lr", "samples_per_second"]
    chip(browser, "training").click()
    hover(browser, "loss", 0.5)
    assert list(told(browser, "loss")["base"]) == ["val_loss"]
    hover(browser, "lr", 0)
    assert told(browser, "lr")["base"]["lr"] == cells(runs / "base")[0]["lr"]


def test_drag_zooms_shift_drag_moves_a_double_click_resets(runs: Path, page: Open) -> None:
    browser = page("base")
    assert ends(browser, "loss") == (1, 40)
    drag(browser, "loss", 10 / 39, 20 / 39)
    assert ends(browser, "loss") == (11, 21)
    assert ends(browser, "accuracy") == (11, 21), "the panels share their axis"
    drag(browser, "loss", 0.2, 0.7, SHIFT)
    first, last = ends(browser, "loss")
    assert (first, last) in ((6, 16), (7, 16), (6, 15))
    browser.one("#pan-right").click()
    assert first + 2 <= ends(browser, "loss")[0] <= first + 3
    first, last = ends(browser, "loss")
    browser.one("#zoom-in").click()
    low, high = ends(browser, "loss")
    assert first < low < high < last
    x, y = place(browser, "loss", 0.5)
    for count in (1, 2):
        browser.mouse("mousePressed", x, y, button="left", clickCount=count)
        browser.mouse("mouseReleased", x, y, button="left", clickCount=count)
    assert ends(browser, "loss") == (1, 40)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_is_sorted_and_filtered(runs: Path, page: Open) -> None:
    browser = page()
    best = {}
    for name in ("base", "odd", "dot"):
        values = [(float(row["val_loss"]), int(row["epoch"])) for row in cells(runs / name) if row["val_loss"] != "nan"]
        best[name] = min(values)
    up = sorted(best, key=lambda name: best[name])
    header = browser.all("#runs thead button")[3]
    for way, order in (("ascending", up), ("descending", up[::-1])):
        header.click()
        assert column(browser, 1)[:3] == order
        assert column(browser, 4)[:3] == [f"{best[name][0]:.5g} ({best[name][1]})" for name in order]
        assert browser.all("#runs thead th")[3].get_attribute("aria-sort") == way
    header.click()
    assert column(browser, 1) == ["base", "odd", "dot", "empty", "other"]
    for words, found in (
        ("ODD", ["odd"]),
        ("h100", ["odd"]),
        ("lr=0.001 no rows", ["empty"]),
        ("zebra", []),
        ("", ["base", "odd", "dot", "empty", "other"]),
    ):
        browser.run(
            "const f = document.getElementById('filter'); f.value = arguments[0]; f.dispatchEvent(new Event('input'))",
            words,
        )
        assert column(browser, 1) == found
        assert browser.texts("#count") == [f"{len(found)} of 5 runs" if len(found) < 5 else "5 runs"]
    browser.one("#filter").send_keys("failed")
    browser.one("#only-these").click()
    pressed = browser.all('#run-chips [aria-pressed="true"]')
    assert [one.get_attribute("data-name") for one in pressed] == ["odd"]


def test_what_differs_in_the_configs(runs: Path, page: Open) -> None:
    browser = page("base", "odd", "other")
    keys = "#config tbody th"
    assert browser.texts(keys) == ["optimizer.lr"]
    assert browser.texts("#config tbody td") == ["0.001", "0.01", "–"]
    browser.one("#all-keys").click()
    assert browser.texts(keys) == ["recipe", "optimizer.lr", "train.epochs", "train.seed"]


def test_starts_failures_and_environment(runs: Path, page: Open) -> None:
    browser = page("base", "odd", "dot")
    assert browser.texts("#timeline .words") == [
        "2 starts: killed, complete",
        "1 start: failed; 1 failure: exception",
        "no start is noted",
    ]
    assert "went on after epoch 12" in browser.texts("#timeline li")[1]
    assert browser.texts("#timeline pre") == ["ValueError: no", TRACE]
    table = dict(zip(browser.texts("#environment tbody th"), browser.texts("#environment tbody tr"), strict=True))
    assert table["host"] == "hostnode1node7–"
    assert table["GPU"] == "GPU–H100–"
    assert table["torch"].startswith("torch2.13.0")


# --- without a mouse --------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_will_do(runs: Path, page: Open) -> None:
    browser = page("base", "odd")
    active = "const a = document.activeElement; return a.dataset.name || a.id || a.className || a.textContent"

    def tab_to(name: str) -> None:
        for _ in range(80):
            browser.keys("Tab")
            if browser.run(active) == name:
                return
        raise AssertionError(f"Tab never comes to {name}")

    tab_to("base")
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.keys("Space")
    assert browser.run(active) == "base", "the focus stays"
    assert chip(browser, "base").get_attribute("aria-pressed") == "false"
    browser.keys("Enter")
    assert chip(browser, "base").get_attribute("aria-pressed") == "true"
    tab_to("plot")
    browser.keys("ArrowRight", "ArrowRight", "ArrowRight")
    assert where(browser, "loss") == "epoch 3"
    assert told(browser, "loss")["base"]["val_loss"] == cells(runs / "base")[2]["val_loss"]
    assert cells(runs / "base")[2]["val_loss"] in browser.texts("#spoken")[0]
    browser.keys("+", "ArrowRight")
    assert int(where(browser, "loss").removeprefix("epoch ")) > 10
    browser.keys("0", "End")
    assert where(browser, "loss") == "epoch 40"
    tab_to("Best")
    browser.keys("Enter")
    assert browser.all("#runs thead th")[3].get_attribute("aria-sort") == "ascending"
    browser.keys("Space")
    assert browser.all("#runs thead th")[3].get_attribute("aria-sort") == "descending"
    assert browser.run(active).startswith("Best"), "the focus stays"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_that_keeps_people_out(runs: Path, page: Open, width: int, dark: bool) -> None:
    browser = page(width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    chip(browser, "lr").click()
    assert browser.run("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert browser.axe() == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
    browser.one("#theme").click()
    assert browser.run("return document.documentElement.dataset.theme") == ("light" if dark else "dark")
    assert browser.axe() == []


# --- what may harm ----------------------------------------------------------------------------------------------------


def test_names_and_texts_of_runs_harm_nothing(dtrain: Dtrain, page: Open) -> None:
    name = f"script>{BAD}"  # in a folder called "<" it becomes "</script>..."
    evil = {"model": {f"</script>{BAD}": BAD, "--><!--<script>": "{{data}}\u2028</style>"}, "recipe": BAD}
    history = [{"epoch": 1, f"</script>{BAD}": 0.5, BAD: 0.25, "__proto__": 1.5, "val_constructor": 2.5, "note": BAD}]
    failure = {"rank": BAD, "cause": BAD, "traceback": TRACE, "others": {BAD: BAD}, "exception": BAD}
    starts = [
        a_start(1e9, host=BAD, versions={BAD: BAD}, gpu="</script><script>window.harmed=1</script>"),
        an_end(2e9, BAD, text=BAD),
    ]
    for folder in ("<", "other"):
        make_run(dtrain.folder / folder / name, history, config=evil, starts=starts, failure=failure)
    browser = page(f"</{name}", f"other/{name}")
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    browser.one("#all-keys").click()
    assert browser.texts("#runs tbody th") == [f"</{name}", f"other/{name}"]
    hover(browser, BAD, 0.5)
    assert told(browser, BAD)[f"</{name}"][BAD] == "0.25"
    assert browser.run("return [window.harmed ?? null, document.images.length, document.scripts.length]") == [
        None,
        0,
        2,
    ]
    assert [key for key in browser.texts("#config tbody th") if "model" in key] == [
        f"model.{key}" for key in evil["model"]
    ]
    assert len(browser.requests()) == 1


def test_the_policy_stops_a_script_that_is_not_the_pages_own(runs: Path, page: Open) -> None:
    browser = page("base")
    script = """const one = document.createElement("script"); one.textContent = "window.harmed = 1"; document.body.append(one);
    const image = document.createElement("img"); image.src = "http://127.0.0.1:9/"; document.body.append(image);
    return window.harmed ?? null"""
    assert browser.run(script) is None
    browser.until("return document.images[0].complete")
    complaints = browser.errors()
    assert len(complaints) == 2
    assert all("Content Security Policy" in complaint for complaint in complaints)


# --- many -------------------------------------------------------------------------------------------------------------


def test_twenty_runs_of_five_hundred_epochs_open_at_once(dtrain: Dtrain, page: Open) -> None:
    for number in range(20):
        make_run(dtrain.folder / f"runs/sweep-{number}", rows(500, number), config=config(seed=number))
    browser = page()
    times = []
    for _ in range(3):
        browser.open((dtrain.folder / "report.html").as_uri())
        times.append(browser.run("return performance.getEntriesByName('dtrain-drawn')[0].startTime"))
    size = (dtrain.folder / "report.html").stat().st_size
    print(f"opened in {sorted(times)[1]:.0f} ms (of 3: {', '.join(f'{t:.0f}' for t in times)}); {size / 1e6:.1f} MB")
    assert sorted(times)[1] < 5000
    hover(browser, "loss", 249 / 499)
    found = told(browser, "loss")
    assert len(found) == 8
    epoch = int(where(browser, "loss").removeprefix("epoch ").removesuffix(", and 12 more runs"))
    assert abs(epoch - 250) <= 1, "there are fewer pixels than epochs"
    for name, values in found.items():
        assert values["val_loss"] == cells(dtrain.folder / "runs" / name)[epoch - 1]["val_loss"]


def test_of_very_many_runs_the_page_draws_some_and_the_filter_finds_the_others(
    dtrain: Dtrain, page: Open, tmp_path: Path
) -> None:
    for number in range(230):
        aged(make_run(tmp_path / f"runs/run-{number:03}", rows(2, number)), 1e9 + number)
    browser = page()
    assert browser.texts("#about")[0].startswith("230 runs")
    assert browser.texts("#count") == ["100 of 230 runs"]
    assert browser.texts("#runs tbody th") == [f"run-{number:03}" for number in range(229, 129, -1)]
    assert "This page shows 100 runs at a time" in browser.texts("#many")[0]
    browser.one("#filter").send_keys("run-00")
    assert browser.texts("#runs tbody th") == [f"run-{number:03}" for number in range(9, -1, -1)]
    assert browser.texts("#count") == ["10 of 230 runs"]
    assert len(browser.all("#run-chips [data-name^=run-]")) == 10
    assert len(browser.all("#timeline details")) == 10
