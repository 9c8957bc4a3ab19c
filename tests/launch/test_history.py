"""`dtrain history`, and what a run notes of its starts: real processes."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import pytest
from helpers.commands import BIN, Dtrain
from helpers.running import running, wait_for
from helpers.runs import COLUMNS, aged, cells, make_run, rows

from dtrain.report.finding import find_runs
from dtrain.report.runs import read_run
from dtrain.rundir.starts import read_starts


def state(folder: Path) -> str:
    return read_run(find_runs([str(folder)], folder.parent)[0]).state


def test_a_run_that_is_killed_stopped_and_completed_has_noted_all_of_it(tmp_path: Path, recipes: Path) -> None:
    words = ["train", recipes / "long.py", "--cpu", "epochs=3", "run.name=it", "model.pause=0.01"]
    folder = tmp_path / "runs/it"
    with running(tmp_path, *words, SLOW="0.05") as run:
        wait_for((folder / "history.csv").exists, "the first epoch")
        wait_for((folder / "checkpoints/epoch-1").exists, "its checkpoint")
        assert state(folder) == "running"
        run.send(signal.SIGKILL)
        run.end()
    assert state(folder) == "killed"
    with running(tmp_path, *words, SLOW="0.05") as run:
        wait_for(lambda: len(read_starts(folder)) == 2, "the second start")
        run.send(signal.SIGTERM)
        assert run.end() == 75, run.text
    assert state(folder) == "stopped"
    with running(tmp_path, *words) as run:
        assert run.end() == 0, run.text
    assert state(folder) == "complete"
    first, second, third = read_starts(folder)
    assert [(one.before, one.why, one.ended is None) for one in (first, third)] == [
        (0, "", True),
        (second.epoch, "complete", False),
    ]
    assert (second.before, second.why, second.text) == (1, "stopped", "on request (SIGTERM)")
    assert first.facts["checkpoint"] is None
    assert second.facts["checkpoint"] == "runs/it/checkpoints/epoch-1"
    assert third.facts["checkpoint"].startswith("runs/it/checkpoints/epoch-")
    assert (third.epoch, third.facts["ranks"], third.facts["device"], third.facts["gpu"]) == (3, 1, "cpu", None)
    again = Dtrain(tmp_path)(*words)
    assert again.code == 0, again.text
    assert len(read_starts(folder)) == 3, "what is complete is not started"


def test_a_run_of_two_ranks_that_fails(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("train", recipes / "faults.py", "-n", "2", "--cpu", "epochs=2", "run.name=it", "model.fault=raise")
    assert done.code == 1, done.text
    assert state(dtrain.folder / "runs/it") == "failed"
    (start,) = read_starts(dtrain.folder / "runs/it")
    assert start.facts["ranks"] == 2
    assert start.before == 0


@pytest.fixture
def two(dtrain: Dtrain) -> Dtrain:
    make_run(dtrain.folder / "runs/short", rows(3), config={"train": {"epochs": 5}})
    aged(make_run(dtrain.folder / "runs/long", rows(40, seed=1, seconds=0.5)), 2000)
    with (dtrain.folder / "runs/short/history.csv").open("a") as file:
        file.write("4,nan,inf,0.5,,-inf,1.5,900.0\n5,0.1")
    aged(dtrain.folder / "runs/short", 1000)
    return dtrain


def test_a_table_in_a_pipe_has_all_rows_and_columns(two: Dtrain) -> None:
    done = two("history", "long")
    assert done.code == 0, done.text
    about, head, *lines = done.out.splitlines()
    assert about.startswith("long: ended, 40 epochs, ")
    assert head.split() == list(COLUMNS)
    known = cells(two.folder / "runs/long")
    assert [line.lstrip("* ").split() for line in lines[:40]] == [
        [row["epoch"], *(f"{float(row[name]):.4g}" for name in COLUMNS[1:])] for row in known
    ]
    best = min(known, key=lambda row: float(row["val_loss"]))
    assert [line.lstrip("* ").split()[0] for line in lines[:40] if line.startswith("*")] == [best["epoch"]]
    assert lines[40] == f"* best epoch: {best['epoch']} (lowest val_loss, {best['val_loss']})"
    assert "\x1b" not in done.out


def test_json_and_csv_have_the_very_values(two: Dtrain) -> None:
    folder = two.folder / "runs/short"
    (told,) = json.loads(two("history", "short", "--json").out)
    texts = cells(folder)[:4]
    assert told["columns"] == list(COLUMNS)
    # JSON's numbers are read as they are written.
    (exact,) = json.loads(two("history", "short", "--json").out, parse_float=str, parse_int=str)
    assert [{k: v or "" for k, v in row.items()} for row in exact["rows"]] == texts
    assert told["rows"][3] == dict(zip(COLUMNS, (4, "nan", "inf", 0.5, None, "-inf", 1.5, 900.0), strict=True))
    assert (told["state"], told["epoch"], told["epochs"], told["starts"]) == ("ended", 4, 5, 0)
    whole = (folder / "history.csv").read_text()
    assert two("history", "short", "--csv").out == whole[: whole.rfind("\n") + 1]


def test_several_runs(two: Dtrain) -> None:
    done = two("history", "short", "long")
    head, first, second, *_ = done.out.splitlines()
    assert head.split("  ")[-1].strip().startswith("AFTER ")
    assert "AT EPOCH 4" in head
    short, long = json.loads(two("history", "short", "long", "--json").out)
    values = {name: cells(two.folder / "runs" / name) for name in ("short", "long")}
    assert short["final"]["value"] == 0.5
    assert long["at_epoch"] == {
        "epoch": 4,
        "value": float(values["long"][3]["val_loss"]),
        "seconds": long["at_epoch"]["seconds"],
    }
    assert f"{long['at_epoch']['value']:.4g}" in second
    assert f"{long['final']['value']:.4g}" in second
    assert "0.5" in first.split()
    table = list(csv.DictReader(io.StringIO(two("history", "short", "long", "--csv").out)))
    assert table == [
        {"run": name, **row} for name in ("short", "long") for row in values[name][: 4 if name == "short" else 40]
    ]


@pytest.mark.parametrize("words", ["history", "history long", "history long --csv", "plot long", "history long --json"])
def test_a_reader_that_has_seen_enough_may_go(two: Dtrain, words: str) -> None:
    long = make_run(two.folder / "runs/longer", rows(3000))
    assert long.is_dir()
    words = words.replace("long", "longer")
    script = f"set -o pipefail; {BIN}/dtrain {words} | head -n 1; echo $?"
    done = two.run("bash", "-c", script)
    assert (done.err, done.out.splitlines()[-1]) == ("", "0")


def test_which_runs_there_are(two: Dtrain) -> None:
    make_run(two.folder / "runs/empty", config={"train": {"epochs": 2}})
    head, *lines = two("history").out.splitlines()
    assert head.split() == ["RUN", "CHANGED", "STATE", "EPOCHS", "BEST"]
    assert [line.split()[0] for line in lines] == ["empty", "long", "short"]
    assert lines[0].split()[-4:] == ["no", "rows", "0/2", "-"]
    best = min(cells(two.folder / "runs/long"), key=lambda row: float(row["val_loss"]))
    assert lines[1].endswith(f"val_loss {float(best['val_loss']):.4g} ({best['epoch']})")
    assert [one["run"] for one in json.loads(two("history", "--json").out)] == ["empty", "long", "short"]
    elsewhere = two("history", "--dir", "nowhere")
    assert (elsewhere.code, elsewhere.out) == (2, "")
    assert "no runs in nowhere" in elsewhere.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["shrot"], "Did you mean 'short'?"),
        (["short", "--metric", "val_los"], "--metric val_los: no such column. Did you mean 'val_loss'?"),
        (["short", "--mode", "least"], "--mode least: should be min or max."),
        (["short", "--json", "--csv"], "--json and --csv: use only one of them."),
    ],
)
def test_what_cannot_be_is_one_message(two: Dtrain, words: list[str], told: str) -> None:
    done = two("history", *words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert len(done.err.splitlines()) == 1
