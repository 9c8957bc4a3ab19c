"""`dtrain bench` says where a step's time goes, and what would make it faster."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.commands import Dtrain

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
    trials = "--trials" if key == "data.delay" else "--no-trials"
    done = dtrain("bench", "slow.py", f"{key}=0.02", "--steps", "12", "--json", "out.json", trials)
    assert done.code == 0, done.text
    found = json.loads((dtrain.folder / "out.json").read_text())["1"]
    assert found["parts"][PARTS[key]] >= 0.02
    assert found["step_seconds"] >= 0.02
    assert found["samples_per_second"] == pytest.approx(4 / found["step_seconds"], rel=1e-6)
    assert found["steps"] == 12
    line = 1 + next(n for n, text in enumerate(SLOW.splitlines()) if ".item()" in text)
    assert found["reads"] == {f"slow.py:{line} (item)": 1.0}
    assert found["asked"] == 1
    others = sum(seconds for name, seconds in found["parts"].items() if name != PARTS[key])
    assert others < 0.02
    if key == "data.delay":
        assert "trying for at most" in done.out
        assert re.search(r"num_workers=2 +[\d.]+ times as fast +DataLoader\(\.\.\., num_workers=2\)", done.out), (
            done.out
        )
    if key == "model.metric_delay":
        assert "model.metric_func takes 2" in done.out


FAILS = """
import os
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_model():
    return nn.Linear(3, 1)


def build_dataloaders():
    return DataLoader(TensorDataset(torch.ones(400, 3), torch.ones(400, 1)), batch_size=4), None


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train_step(model, x, y):
    time.sleep(0.004)
    fused = model.optimizer.param_groups[0]["fused"]
    if fused and os.environ.get("RANK") == "1":
        raise ValueError("rank 1 alone does not like that")
    return (model(x) - y).square().mean()
"""


def test_ranks_are_compared_with_one_and_one_that_fails_in_a_trial_alone_costs_that_trial(dtrain: Dtrain) -> None:
    (dtrain.folder / "fails.py").write_text(FAILS)
    done = dtrain("bench", "fails.py", "-n", "2", "--cpu", "--steps", "12", "--json", "out.json")
    assert done.code == 0, done.text
    assert "1 rank on cpu, 12 steps:" in done.out
    assert "2 ranks on cpu, 12 steps:" in done.out
    assert "% of 2 times" in done.out
    assert "skipped: fused=True: ValueError: rank 1 alone does not like that" in done.out
    assert "rank 1 alone" not in done.err, "it is no failure of the bench"
    found = json.loads((dtrain.folder / "out.json").read_text())
    assert found["1"]["trials"] == []
    fused, batch = found["2"]["trials"]
    assert fused["why"]
    assert batch["name"] == "batch_size=8"
    assert len(batch["base"]) == len(batch["tried"]) >= 1, "what comes after it was tried"
    assert {*dtrain.folder.iterdir()} >= {dtrain.folder / "out.json"}
    assert not (dtrain.folder / "runs").exists()


def test_a_fault_of_the_recipe_is_the_users(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("bench", recipes / "small.py", "model.fault=raise")
    assert done.code == 1
    assert "a fault of the user's own" in done.err
    assert dtrain("bench", recipes / "small.py", "model.fault=raise", "epoch=3").code == 2
