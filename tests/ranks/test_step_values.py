"""Parameters of steps that have a default are set by the config, checked as a builder's are, and part of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_model():
    return nn.Linear(1, 1)


def build_dataloaders(extra: bool = False):
    data = TensorDataset(*[torch.ones(6, 1)] * (3 if extra else 2))
    return DataLoader(data, batch_size=2), DataLoader(data, batch_size=2)


def build_optimizer(model, lr: float = 0.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train_step(model, x, y, smoothing: float = 0.1, *, power: int = 1):
    return {"loss": (model(x) - y).square().mean(), "seen": smoothing**power}


def valid_step(model, x, y, smoothing: float = 0.3, bias: float = 1.0):
    return {"loss": (model(x) - y).square().mean(), "seen": smoothing + bias}
"""


def start(folder: Path, *words: str) -> Path:
    (folder / "valued.py").write_text(RECIPE)
    how = [f"run.dir={folder}", "run.name=it", "epochs=1", *words]
    return train_run(load_settings(str(folder / "valued.py"), how, {}), bring_up(cpu=True))


@pytest.mark.parametrize(
    ("words", "train", "valid"),
    [
        ([], 0.1, 1.3),
        (["smoothing=0.5", "step.power=2"], 0.25, 1.5),
        (["step.smoothing=0.5", "step.bias=2"], 0.5, 2.5),
        (["bias=3"], 0.1, 3.3),
    ],
)
def test_both_steps_get_what_they_take(tmp_path: Path, words: list[str], train: float, valid: float) -> None:
    row = read_history(start(tmp_path, *words)).iloc[0]
    assert (row["seen"], row["val_seen"]) == (pytest.approx(train), pytest.approx(valid))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("step.smothing=0.5", r"step.smothing = 0.5 \(command line\): no such parameter. Did you mean 'smoothing'"),
        ("step.power=a", r"step.power = 'a' \(command line\): should be a valid integer"),
        ("step.x=1", r"step.x = 1 \(command line\): no such parameter"),
        ("data.extra=true", r"train_step|arguments"),
    ],
)
def test_what_is_wrong_is_named_before_training(tmp_path: Path, word: str, told: str) -> None:
    more = ["step.smoothing=0.5"] if "extra" in word else []
    with pytest.raises(Exception, match=told):
        start(tmp_path, word, *more)
    assert not (tmp_path / "it/history.csv").exists()


def test_another_value_is_another_run(tmp_path: Path) -> None:
    start(tmp_path, "step.smoothing=0.5")
    with pytest.raises(AgreedError, match=r"step\.smoothing was 0\.5 and is 0\.7"):
        start(tmp_path, "step.smoothing=0.7", "epochs=2")
    assert len(read_history(start(tmp_path, "step.smoothing=0.5", "epochs=2"))) == 2


def test_a_builders_parameter_of_the_name_step_may_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(RECIPE.replace("def build_model():", 'def build_model(step: str = "plain"):'))
    assert "step: str" in (tmp_path / "it.py").read_text()
    how = [f"run.dir={tmp_path}", "run.name=it", "epochs=1", "step=other", "step.smoothing=0.2"]
    run = train_run(load_settings(str(tmp_path / "it.py"), how, {}), bring_up(cpu=True))
    config = (run / "config.yaml").read_text()
    assert "step: other" in config
    assert "smoothing: 0.2" in config
