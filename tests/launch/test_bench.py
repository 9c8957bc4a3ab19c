"""`dtrain bench` says where a step's time goes, and what would make it faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import Dtrain

from dtrain.tools.bench.advice import BenchResult, advice

SLOW = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Slow(Dataset):
    def __init__(self, delay):
        self.delay = delay

    def __len__(self):
        return 400

    def __getitem__(self, index):
        time.sleep(self.delay / 4)
        return torch.ones(3), torch.ones(1)


def slow_metric(predictions, labels):
    time.sleep(model.metric_delay)
    return (predictions - labels).abs().mean()


def build_model(metric_delay: float = 0.0):
    global model
    model = nn.Linear(3, 1)
    model.metric_delay = metric_delay
    model.metric_func = slow_metric
    return model


def build_dataloaders(delay: float = 0.0):
    return DataLoader(Slow(delay), batch_size=4), None


def build_optimizer(model, delay: float = 0.0):
    class Slower(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(delay)
            return super().step(closure)

    return Slower(model.parameters(), lr=0.1)


def train_step(model, x, y):
    predictions = model(x)
    return ((predictions - y) ** 2).mean(), model.metric_func(predictions, y).item()
"""

PARTS = {"data.delay": "data", "model.metric_delay": "metric function", "optimizer.delay": "optimizer"}


@pytest.mark.parametrize("key", PARTS)
def test_a_delay_is_found_where_it_is(dtrain: Dtrain, key: str) -> None:
    (dtrain.folder / "slow.py").write_text(SLOW)
    done = dtrain("bench", "slow.py", f"{key}=0.02", "--steps", "12", "--json", "out.json")
    assert done.code == 0, done.text
    found = json.loads((dtrain.folder / "out.json").read_text())["1"]
    assert found["parts"][PARTS[key]] >= 0.02
    assert found["step_seconds"] >= 0.02
    assert found["samples_per_second"] == pytest.approx(4 / found["step_seconds"], rel=1e-6)
    assert found["steps"] == 12
    assert found["asked"] == 1, "the step's .item()"
    others = sum(seconds for name, seconds in found["parts"].items() if name != PARTS[key])
    assert others < 0.02
    if key == "data.delay":
        assert "num_workers=2 or more" in done.out
    if key == "model.metric_delay":
        assert "model.metric_func takes 2" in done.out


def test_ranks_are_compared_with_one(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("bench", recipes / "small.py", "n_train=400", "-n", "2", "--cpu", "--steps", "20")
    assert done.code == 0, done.text
    assert "1 rank on cpu, 20 steps:" in done.out
    assert "2 ranks on cpu, 20 steps:" in done.out
    assert "% of 2 times" in done.out
    assert not (dtrain.folder / "runs").exists()


def test_a_fault_of_the_recipe_is_the_users(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("bench", recipes / "small.py", "model.fault=raise")
    assert done.code == 1
    assert "a fault of the user's own" in done.err
    assert dtrain("bench", recipes / "small.py", "model.fault=raise", "epoch=3").code == 2


def measured(**changes: object) -> BenchResult:
    parts = {"data": 0.1, "transfer": 0.1, "forward and backward": 1.0, "metric function": 0.1, "optimizer": 0.1}
    fields = {"step_seconds": 1.4, "samples_per_second": 10.0, "parts": parts, "asked": 2.0, "device": "cpu"}
    return BenchResult(**{**fields, "workers": 0, "by_batch": False, "steps": 5, **changes})


def test_advice_fits_what_was_found() -> None:
    assert advice(measured()) == []
    (gpu,) = advice(measured(device="cuda"))
    assert "2 times (.item()" in gpu
    slow = {"data": 2.0, "transfer": 0.6, "forward and backward": 1.0, "metric function": 0.0}
    first, second = advice(measured(parts=slow))
    assert "num_workers=2 or more" in first
    assert "pin_memory" in second
    assert "do less in __getitem__" in advice(measured(parts=slow, workers=4))[0]
    assert "the model is small" in advice(measured(parts=slow, by_batch=True))[0]
    assert "in the main process" in advice(measured(parts=slow, workers=None))[0]
