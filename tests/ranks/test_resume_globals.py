"""What a recipe's globals hold as a run begins is compared when it is resumed: a file that they come from may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import json, os, time
from pathlib import Path
import torch
from torch import nn

HERE = Path(__file__).parent
READ = json.loads((HERE / "read.json").read_text())
TABLE, DEEP, WORD = torch.tensor(READ["table"]), {"a": [1, {"b": READ["deep"]}]}, READ["word"]
TEACHER = nn.Linear(2, 1)
nn.init.constant_(TEACHER.weight, READ["teacher"])
STARTED, WHERE, SHADOW, API_TOKEN, OBJECT = time.time(), str(HERE / READ["word"]), os.getpid() + 2e9, READ["word"], object()
ONE, TWO = READ["one"], READ["two"]
STEPS = 0

class Odd(dict):
    def __len__(self):
        raise ValueError

ODD = {"odd": Odd()}

def build_model():
    return nn.Linear(2, 1)

def build_dataloaders():
    batches = [(torch.ones(2, 2) * n, torch.ones(2, 1)) for n in range(4)]
    return batches, batches

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)

def train_step(model, x, y):
    global STEPS
    STEPS += 1
    return (model(x) - y).square().mean(), 1.0

valid_step = train_step
"""
READ: dict[str, Any] = {"table": [1.0, 2.0], "deep": 0.5, "word": "relu", "teacher": 0.25, "one": 1, "two": 1}
WORDS = "not what it was when the run began, though the code is the same"


def train(folder: Path, epochs: int, read: dict[str, Any], *words: str) -> list[int]:
    (folder / "globals_of_mine.py").write_text(RECIPE if not words else RECIPE.replace("lr=0.01", "lr=0.02"))
    (folder / "read.json").write_text(json.dumps(read))
    values = [f"run.dir={folder}", "run.name=it", f"epochs={epochs}", *words]
    settings = load_settings(str(folder / "globals_of_mine.py"), values, environ={})
    return [int(epoch) for epoch in read_history(train_run(settings, bring_up(cpu=True), "auto"))["epoch"]]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("table", [1.0, 2.5], "TABLE"),
        ("deep", 0.75, "DEEP"),
        ("word", "gelu", "WORD"),
        ("teacher", 0.5, "TEACHER"),
        ("two", 2, "TWO"),
        ("another", 1, "READ"),
        ("teacher", 0.25, ""),
    ],
)
def test_a_value_that_is_another_one_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any, named: str
) -> None:
    train(tmp_path, 1, READ)
    assert train(tmp_path, 2, READ) == [1, 2]
    assert WORDS not in caplog.text, "neither the time, nor a place, nor what training has counted"
    assert train(tmp_path, 3, READ | {key: value}) == [1, 2, 3]
    assert (WORDS in caplog.text) is bool(named)
    told = caplog.text.partition(WORDS)[0].rpartition("WARNING")[2]
    assert not named or f"globals_of_mine.{named}" in told
    assert "API_TOKEN" not in caplog.text and "WHERE" not in caplog.text


def test_with_other_code_that_was_accepted_values_may_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 1, READ)
    assert train(tmp_path, 2, READ | {"word": "gelu"}, "accept=code") == [1, 2]
    assert WORDS not in caplog.text


def test_the_marks_are_small_and_show_no_value(tmp_path: Path) -> None:
    train(tmp_path, 1, READ)
    (manifest,) = tmp_path.glob("it/checkpoints/*/manifest.json")
    marks = json.loads(manifest.read_text())["samples"]["globals"]
    names = {name.rpartition(".")[2] for name in marks}
    assert names == {"READ", "TABLE", "DEEP", "WORD", "TEACHER", "STEPS", "ONE", "TWO"}
    assert "relu" not in json.dumps(marks)
