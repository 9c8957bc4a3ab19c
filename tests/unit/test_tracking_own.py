"""Numbers of a user's own: which names they may have, how many of them go on, and what does not count as a row."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dtrain.callbacks.media import RunMedia
from dtrain.callbacks.progress import PassFacts, RunFacts
from dtrain.callbacks.tracking import tracking
from dtrain.callbacks.tracking.base import RunEnd, TrackedRun
from dtrain.callbacks.tracking.files import STEPS, StepLog, read_lines
from dtrain.callbacks.tracking.mlflow_tracker import MlflowBackend
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.callbacks.tracking.values import Values
from dtrain.config.schema import MlflowConfig
from dtrain.engine.metrics import MeanTable
from dtrain.engine.run import Run, RunState
from dtrain.errors import UsageError
from dtrain.layout import TRACKING
from dtrain.rundir.columns import NO_METRICS

Metric = namedtuple("Metric", "key value timestamp step")


def run_at(step: int, media: Any = None) -> Run:
    engine: Any = SimpleNamespace(place=SimpleNamespace(updates=step))
    return Run(engine, RunState(media=media))


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1000.0 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(tracking, "time", found)
    return found


class Own:
    """A run's `run.log`, step by step, and what became of it."""

    def __init__(self, folder: Path, every: float) -> None:
        self.folder = folder
        self.tracking = Tracking(folder, StepLog(folder), every=every, device=torch.device("cpu"))
        self._media = RunMedia(folder, 0, self.tracking)

    def log(self, step: int, **values: float) -> None:
        run_at(step, self._media).log(values)

    def kept(self) -> list[Any]:
        lines = read_lines(self.folder / TRACKING / STEPS)
        return [line.get("row", line.get("firm")) or (line["updates"], line["values"]) for line in lines]


@pytest.mark.parametrize("name", [*NO_METRICS, "dtrain.epoch"])
@pytest.mark.parametrize("media", [None, SimpleNamespace(log=lambda *_: None)])
def test_a_name_of_dtrains_own_is_refused_on_every_rank_with_the_remedy(name: str, media: Any) -> None:
    mine = f"my/{name.removeprefix('dtrain.')}"
    with pytest.raises(UsageError, match=f"run.log got a value named '{name}'.* such as \"{mine}\"\\."):
        run_at(3, media).log({"fine": 1.0, name: 2.0})
    run_at(3, media).log({mine: 2.0})


def test_with_a_value_in_each_step_the_last_one_of_each_interval_goes_on(tmp_path: Path, clock: Clock) -> None:
    own = Own(tmp_path, every=1.0)
    own.log(1, a=1.0)
    for step in range(2, 100):
        clock.now = 100.0 + step / 100
        own.log(step, a=float(step), **({"b": float(step)} if step == 50 else {}))
    assert own.kept() == [(1, {"a": 1.0})]
    clock.now = 101.0
    own.log(100, a=100.0)
    assert own.kept()[1:] == [(50, {"b": 50.0}), (100, {"a": 100.0})], "each with its own step"
    at = [line["at"] for line in read_lines(tmp_path / TRACKING / STEPS)]
    assert at == [1100.0, 1100.5, 1101.0]


def test_the_last_value_is_there_before_the_row_and_the_end_and_what_comes_after_it(
    tmp_path: Path, clock: Clock
) -> None:
    own = Own(tmp_path, every=1.0)
    own.tracking.on_pass_start(PassFacts("train", 1, run=RunFacts(updates=lambda: 40)))
    for step in (10, 20):
        own.log(step, a=float(step))
    own.tracking.on_validation_end({"epoch": 1, "step": 30, "val_loss": 0.5})
    own.log(35, a=35.0)
    clock.now += 1.0
    own.tracking.on_progress(MeanTable("train"))
    own.log(40, a=40.0)
    own.tracking.on_epoch_end({"epoch": 1})
    own.log(41, a=41.0)
    own.tracking.finish(RunEnd())
    kept = own.kept()
    assert [line[0] if isinstance(line, tuple) else line for line in kept] == [10, 20, 30, 35, 40, 40, 1, 1, 41]
    assert [line[1]["a"] for line in kept if isinstance(line, tuple) and "a" in line[1]] == [10, 20, 35, 40, 41]


def test_where_epochs_alone_are_wanted_there_is_one_value_an_epoch(tmp_path: Path, clock: Clock) -> None:
    own = Own(tmp_path, every=0.0)
    for epoch in (1, 2):
        for step in range(3):
            clock.now += 1e6
            own.log(3 * epoch + step, a=float(step))
        own.tracking.on_epoch_end({"epoch": epoch})
    assert [line for line in own.kept() if isinstance(line, tuple)] == [(5, {"a": 2.0}), (8, {"a": 2.0})]


def test_values_named_as_what_a_line_tells_by_itself_stay_values(tmp_path: Path) -> None:
    named = {"row": 7.0, "firm": 8.0, "updates": 9.0, "at": 10.0}
    log = StepLog(tmp_path)
    log.add({"updates": 2, "at": 5.0, "values": named})
    log.close()
    assert [(e.step, e.at, e.values) for e in Values(tmp_path).news()] == [(2, 5.0, named)]
    StepLog(tmp_path, epochs=1, updates=2).close()
    assert {"updates": 2, "at": 5.0, "values": named} in read_lines(tmp_path / TRACKING / STEPS), (
        "it is of a step that the checkpoint holds"
    )


def test_lines_of_earlier_versions_are_understood(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    log.add({"updates": 2, "at": 5.0, "step/loss": 1.0, "row": 7.0, "epoch": 1.0})
    log.close()
    StepLog(tmp_path, updates=2).close()
    assert [(e.step, e.at, e.values) for e in Values(tmp_path).news()] == [(2, 5.0, {"step/loss": 1.0, "row": 7.0})]


class Client:
    """MLflow's, as far as metrics go."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []

    def log_batch(self, _: str, metrics: list[Any]) -> None:
        self.metrics += metrics

    def get_metric_history(self, _: str, name: str) -> list[Any]:
        return [metric for metric in self.metrics if metric.key == name]

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params={"it": "is described"}))


def test_mlflow_takes_no_epoch_that_others_log_for_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entities: Any = ModuleType("mlflow.entities")
    entities.Metric = Metric
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    backend = MlflowBackend(MlflowConfig(), TrackedRun(tmp_path, {}, {}))
    client = Client()
    backend._client = client  # type: ignore[assignment]
    assert backend.last_epoch() == 0
    client.metrics += [Metric("epoch", float(epoch), 0, epoch) for epoch in (1, 2)]  # rows, of an earlier version
    client.metrics += [Metric("epoch", 2.0, 0, 640)]  # a user's
    assert backend.last_epoch() == 2
    backend.log({"epoch": 3, "loss": 0.5}, 3)
    backend.log({"step/loss": 0.5}, 700)
    client.metrics += [Metric("epoch", 4.0, 0, 4), Metric("epoch", 4.0, 0, 960)]
    assert backend.last_epoch() == 3
