"""MLflow's server is away, or the run is killed: each row of the history arrives there once, at the latest by `dtrain sync`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Dtrain
from helpers.running import running, wait_for

from dtrain.rundir.history import read_history

FAKE = Path(__file__).resolve().parents[1] / "helpers" / "fake_mlflow"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "server").mkdir()
    return {"PYTHONPATH": str(FAKE), "FAKE_MLFLOW": str(tmp_path / "server")}


def words(recipes: Path, *more: object) -> tuple[object, ...]:
    return ("train", recipes / "small.py", "run.name=it", "track.mlflow.experiment=mine", "--cpu", *more)


def only_run(folder: Path) -> dict[str, Any]:
    (run,) = json.loads((folder / "server/store.json").read_text())["runs"]
    return dict(run)


def rows(run: dict[str, Any], name: str = "loss") -> list[tuple[int, float]]:
    return [(step, value) for found, value, step in run["metrics"] if found == name]


def truth(folder: Path) -> list[tuple[int, float]]:
    history = read_history(folder / "runs/it")
    return list(zip(history["epoch"].tolist(), history["loss"].tolist(), strict=True))


def test_a_run_that_is_killed_before_the_server_has_its_rows(
    tmp_path: Path, recipes: Path, env: dict[str, str]
) -> None:
    (tmp_path / "server/stuck").touch()
    with running(tmp_path, *words(recipes, "epochs=2"), **env) as one:
        one.until("runs/it/checkpoints/epoch-2")
        wait_for(lambda: '{"firm": 2}' in (tmp_path / "runs/it/tracking/steps.jsonl").read_text(), "the row is final")
        one.send(signal.SIGKILL)
        one.end()
    assert rows(only_run(tmp_path)) == [], "the server has not got any of them"
    (tmp_path / "server/stuck").unlink()
    done = Dtrain(tmp_path)(*words(recipes, "epochs=4"), **env)
    assert done.code == 0, done.text
    run = only_run(tmp_path)
    assert rows(run) == truth(tmp_path)
    assert [epoch for epoch, _ in rows(run)] == [1, 2, 3, 4]
    assert run["status"] == "FINISHED"
    assert run["params"]["train.seed"] == "42"


def test_what_a_server_that_is_away_did_not_get_is_sent_by_sync(
    tmp_path: Path, recipes: Path, env: dict[str, str]
) -> None:
    (tmp_path / "server/away").touch()
    dtrain = Dtrain(tmp_path)
    more = ("epochs=3", "track.every_seconds=0.001", "track.artifacts=last")
    done = dtrain(*words(recipes, *more), **env)
    assert done.code == 0, done.text
    assert "mlflow: offline: MlflowException: API request failed: Connection refused. Training continues" in done.err
    assert "All values are kept; send them later with: dtrain sync runs/it" in done.err
    assert len(truth(tmp_path)) == 3
    away = dtrain("sync", "runs/it", **env)
    assert away.code == 1
    assert "runs/it: not everything was sent to MLflow's own store: MlflowException: API request failed" in away.err
    (tmp_path / "server/away").unlink()
    sent = dtrain("sync", "runs/it", **env)
    assert sent.code == 0, sent.text
    assert "runs/it: sent, 3 epochs" in sent.out
    run = only_run(tmp_path)
    assert rows(run) == truth(tmp_path)
    assert rows(run, "step/loss"), "what is within epochs is sent, too"
    assert run["status"] == "FINISHED"
    assert {"history.csv", "model.txt", "weights/model.safetensors"} <= set(run["files"])
    again = dtrain("sync", "runs/it", **env)
    assert (again.code, "runs/it: nothing to send (3 epochs" in again.out) == (0, True), again.text
    assert only_run(tmp_path) == run
