"""`dtrain clean`: what it lists and deletes, and above all what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import a_start, an_end, make_run, rows
from torch import nn
from typer.testing import CliRunner

from dtrain.checkpoint.folder import write_checkpoint
from dtrain.checkpoint.weights import WEIGHTS, weights_file
from dtrain.cli.app import app
from dtrain.cli.history import _show
from dtrain.report.compare import compare
from dtrain.report.finding import find_runs
from dtrain.report.runs import read_run
from dtrain.rundir.lock import owned

FAILED = {"starts": [a_start(1), an_end(2, "failed")], "config": {"train": {"epochs": 3}}}


def clean(runs: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["clean", "--dir", str(runs), *words])
    return done.exit_code, done.output


def everything(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def saved(run: Path, losses: list[float], within: int | None = None) -> Path:
    """Gives a run checkpoints of these epochs, and one within the next."""
    for epoch, loss in enumerate(losses, 1):
        row: dict[str, Any] = {"row": {"epoch": epoch, "loss": loss, "val_loss": loss}}
        write_checkpoint(run / "checkpoints", f"epoch-{epoch}", {WEIGHTS: weights_file(nn.Linear(9, 9))}, row)
    if within is not None:
        name = f"epoch-{len(losses) + 1}-step-{within}"
        write_checkpoint(run / "checkpoints", name, {WEIGHTS: weights_file(nn.Linear(9, 9))}, {})
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three that left nothing, and others of each kind that did."""
    runs = tmp_path / "runs"
    make_run(runs / "failed", **FAILED, failure={"kind": "ValueError"})
    make_run(runs / "killed", starts=[a_start(1)])
    make_run(runs / "stopped", starts=[a_start(1), an_end(2, "stopped")])
    make_run(runs / "one-epoch", rows(1), **FAILED)
    saved(make_run(runs / "within", **FAILED), [], within=4)
    make_run(runs / "waiting", config={"train": {"epochs": 3}})
    (runs / "mine").mkdir()
    (runs / "mine" / "config.yaml").write_text("{}")
    return runs


LEFT_NOTHING = {"failed", "killed", "stopped"}


def test_looking_changes_nothing_and_says_how_much(runs: Path) -> None:
    before = everything(runs)
    code, out = clean(runs)
    size = sum(p.stat().st_size for name in LEFT_NOTHING for p in (runs / name).rglob("*") if p.is_file())
    assert code == 0
    assert {Path(line.split()[0]).name for line in out.splitlines()[:-1]} == LEFT_NOTHING
    assert out.splitlines()[-1] == f"3 runs, {size:,} bytes would be deleted; delete with --yes"
    assert everything(runs) == before


def test_deleted_is_what_was_listed_and_nothing_else(runs: Path) -> None:
    before = {path.name for path in runs.iterdir()}
    code, out = clean(runs, "--yes")
    assert (code, out.splitlines()[-1][:14]) == (0, "deleted 3 runs")
    assert {path.name for path in runs.iterdir()} == before - LEFT_NOTHING
    assert clean(runs, "--yes") == (0, f"nothing was deleted in {runs}\n")


def test_a_named_run_alone(runs: Path) -> None:
    assert clean(runs, "failed", "--yes")[0] == 0
    assert not (runs / "failed").exists()
    assert (runs / "killed").exists()


def test_what_is_left_alone(runs: Path, tmp_path: Path) -> None:
    """Runs in use, of SLURM's jobs, with files of the user's; links, in whatever place."""
    (runs / "killed" / "notes.txt").write_text("mine")
    (runs / "stopped" / "slurm").mkdir()
    record = {"job": 7, "array": None, "command": [], "folder": ".", "submitted": 1.0}
    (runs / "stopped" / "slurm" / "job.json").write_text(json.dumps(record))
    outside = make_run(tmp_path / "elsewhere", **FAILED)
    (runs / "link").symlink_to(outside)
    (runs / "failed" / "logs").symlink_to(outside)
    before = everything(outside)
    with owned(runs / "failed"):
        code, out = clean(runs, "--yes")
        assert "failed: it is in use by" in out
        assert code == 0
    assert "killed: it contains notes.txt, not written by dtrain" in out
    assert "stopped: " in out
    assert {path.name for path in runs.iterdir()} >= LEFT_NOTHING | {"link"}
    assert clean(runs, "--yes")[1].splitlines()[0].startswith(f"{runs / 'failed'}  ")
    assert not (runs / "failed").exists(), "the link in it went, and not what it leads to"
    assert everything(outside) == before
    for name in (str(outside), str(runs / "link")):
        code, out = clean(runs, name, "--yes")
        assert code == 2 if name == str(outside) else "a symbolic link" in out
    assert everything(outside) == before


def test_a_run_that_is_started_meanwhile_stays(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.tools import clean as module

    def first_train(item: Any, rule: Any, delete: Any = module.delete) -> str:
        if item.path.name == "failed":
            (item.path / "history.csv").write_text("epoch,loss\n1,0.5\n")
        return str(delete(item, rule))

    monkeypatch.setattr(module, "delete", first_train)
    code, out = clean(runs, "--yes")
    assert code == 1
    assert f"skipped {runs / 'failed'}: it has changed meanwhile" in out
    assert (runs / "failed" / "history.csv").exists()


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--keep-last", "1"], {"epoch-2", "epoch-5", "epoch-6-step-3"}),  # the best one and an epoch's end stay, too
        (["--keep-best", "2"], {"epoch-2", "epoch-3", "epoch-5", "epoch-6-step-3"}),
        (["--keep-last", "3", "--keep-best", "1"], {"epoch-2", "epoch-4", "epoch-5", "epoch-6-step-3"}),
        ([], {"epoch-1", "epoch-2", "epoch-3", "epoch-4", "epoch-5", "epoch-6-step-3"}),
    ],
)
def test_checkpoints_beyond_a_rule(tmp_path: Path, words: list[str], kept: set[str]) -> None:
    torch.manual_seed(0)
    run = saved(make_run(tmp_path / "runs/it", rows(5), config={"train": {"epochs": 9}}), [5, 1, 2, 4, 3], within=3)
    every = everything(run)
    assert clean(tmp_path / "runs", *words)[0] == 0
    assert everything(run) == every
    with owned(run):
        assert "in use by" in clean(tmp_path / "runs", *words, "--yes")[1] or not words
    assert {path.name for path in (run / "checkpoints").iterdir()} >= kept
    assert clean(tmp_path / "runs", *words, "--yes")[0] == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == kept
    (tmp_path / "far").mkdir()
    (run / "checkpoints").rename(tmp_path / "far/checkpoints")
    (run / "checkpoints").symlink_to(tmp_path / "far/checkpoints")
    clean(tmp_path / "runs", "--keep-last", "1", "--yes")
    assert {path.name for path in (tmp_path / "far/checkpoints").iterdir()} == kept


def test_the_list_of_runs_counts_what_it_folds_away(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [read_run(place) for place in find_runs([], runs)]
    whole = compare(found, None, None)
    _show(found, whole, listed=True, chosen=None, width=120)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == (
        "not shown: 3 runs that ended before their first epoch (--all shows them, dtrain clean deletes them)"
    )
    assert {line.split()[0] for line in out.splitlines()[1:-1]} == {"mine", "one-epoch", "waiting", "within"}
    _show(found, whole, listed=True, chosen=None, width=None)  # a pipe, or --all
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {
        path.name for path in runs.iterdir()
    }
