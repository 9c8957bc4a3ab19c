"""A run's config.yaml has its builders' defaults: what a recipe changes later does not change the run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

import dtrain
from dtrain.config import Settings, load_settings
from dtrain.config.saved import load_run_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import DtrainError
from dtrain.recipe.loader import bind, load_recipe
from dtrain.report.data import run_data
from dtrain.report.finding import RunLocation
from dtrain.report.runs import read_run
from dtrain.trainer.evaluate import evaluate_run, restore_run
from dtrain.trainer.train import train_run

RECIPE = """
import enum, math
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Kind(enum.Enum):
    PLAIN = "plain"

def build_model(hidden: int = 3, widths=(1, 2), kind: Kind = Kind.PLAIN, act=nn.ReLU, where: Path = Path("x"),
                text="7 s", bright=True, nothing: int | None = None, most=math.inf, api_key="x1", *, big=[0] * 5000):
    assert isinstance(widths, tuple) and isinstance(kind, Kind) and isinstance(where, Path) and text == "7 s"
    return nn.Sequential(nn.Linear(2, hidden), act(), nn.Linear(hidden, 1))

def build_dataloaders(n: int = 8, rank=None):
    x = torch.arange(2.0 * n).view(n, 2) / n
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)

def build_optimizer(model, lr: float = 0.01, epochs=None):
    assert epochs == EPOCHS
    return torch.optim.SGD(model.parameters(), lr=lr)

def train_step(model, x, y, weight=None, scale: float = 1.0, noise: float = 0.5):
    assert weight is None
    return scale * (model(x) - y).square().mean()

def valid_step(model, x, y, noise: float = 0.0):
    assert noise == 0.0
    return (model(x) - y).square().mean()
"""
WRITTEN = {
    "model": {"hidden": 3, "widths": [1, 2], "kind": "plain", "where": "x", "text": "7 s", "bright": True}
    | {"nothing": None, "most": float("inf")},
    "data": {"n": 8},
    "optimizer": {"lr": 0.01},
    "step": {"scale": 1.0},
}


def train(folder: Path, *words: str, epochs: int = 2, recipe: str = RECIPE) -> Path:
    file = folder / "mine.py"
    file.write_text(recipe.replace("EPOCHS", str(epochs)))
    named = [f"run.dir={folder}", "run.name=it", f"epochs={epochs}", *words]
    return train_run(load_settings(str(file), named, environ={}), bring_up(cpu=True))


def bound(run: Path, recipe: str) -> Settings:
    (run.parent / "mine.py").write_text(recipe.replace("EPOCHS", "2"))
    settings = load_run_settings(run, [])
    bind(load_recipe(settings.config.recipe, settings.base), settings)
    return settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"))


def test_every_default_that_yaml_can_hold_is_written(trained: Path) -> None:
    text = (trained / "config.yaml").read_text()
    tree = yaml.safe_load(text)
    assert {section: tree[section] for section in WRITTEN} == WRITTEN
    assert tree["defaults"] == [f"{section}.{name}" for section in WRITTEN for name in WRITTEN[section]]
    last = text.splitlines()[-1]
    assert last.startswith("# Defaults of the recipe that are not above: model.act (YAML cannot hold this type), ")
    assert "model.api_key (a secret), model.big (long), step.noise (train_step and valid_step differ in it)" in last
    assert "lr" in {
        key.rpartition(".")[2]
        for key in run_data(read_run(RunLocation("it", trained, trained / "history.csv")))["config"]
    }, "the page shows it"


def test_with_the_same_recipe_nothing_is_given(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = bound(trained, RECIPE)
    assert not settings.config.model
    assert not settings.config.step
    assert settings.origin("model.hidden") == "default of build_model"
    assert settings.to_yaml() == (trained / "config.yaml").read_text()
    assert not caplog.records


def test_a_changed_default_does_not_change_a_run_and_is_told(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = evaluate_run(restore_run(trained, bound(trained, RECIPE), "best", bring_up(cpu=True)), bring_up(cpu=True))
    other = RECIPE.replace("hidden: int = 3", "hidden: int = 7").replace(", bright=True", "")
    with caplog.at_level(logging.WARNING):
        settings = bound(trained, other)
    assert settings.config.model == {"hidden": 3}
    words = " | ".join(record.getMessage() for record in caplog.records)
    assert f"model.hidden = 3 ({trained}/config.yaml:3): a default of then, and kept; the recipe's is 7 now" in words
    assert "model.bright = True" in words
    after = evaluate_run(restore_run(trained, settings, "best", bring_up(cpu=True)), bring_up(cpu=True))
    assert after.means == before.means
    assert dtrain.load(trained)[0].out_features == 3
    again = load_run_settings(trained, [])
    bind(load_recipe(again.config.recipe, again.base), again)
    assert "model.hidden" in again.plain()["defaults"], "still no value that anybody has set"
    moved = load_run_settings(trained, ["model.hidden=4"])
    bind(load_recipe(moved.config.recipe, moved.base), moved)
    assert moved.config.model["hidden"] == 4
    assert "model.hidden" not in moved.plain()["defaults"]


def test_a_resume_with_another_default_is_refused_by_name(tmp_path: Path) -> None:
    run = train(tmp_path)
    changed = RECIPE.replace("lr: float = 0.01", "lr: float = 0.1")
    with pytest.raises(DtrainError, match=r"optimizer.lr was 0.01 and is 0.1 \(default of build_optimizer\)"):
        train(tmp_path, "accept=code", epochs=3, recipe=changed)
    settings = load_run_settings(run, ["epochs=3", "accept=code"])  # the remedy: --resume RUN
    train_run(settings, bring_up(cpu=True), str(run))
    rates = [line.split(",")[3] for line in (run / "history.csv").read_text().splitlines()]
    assert rates == ["lr", "0.01", "0.01", "0.01"]


def test_a_run_without_a_checkpoint_begins_with_the_new_default(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"):
        train(tmp_path, recipe=RECIPE.replace("assert weight is None", "raise ValueError('boom')"))
    run = train(tmp_path, recipe=RECIPE.replace("hidden: int = 3", "hidden: int = 7"))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["hidden"] == 7


def test_a_config_of_an_older_version_works_as_before(trained: Path) -> None:
    file = trained / "config.yaml"
    whole = file.read_text()
    tree = yaml.safe_load(whole)
    file.write_text(yaml.safe_dump({**tree, "defaults": [], **{section: {} for section in WRITTEN}}))
    try:
        assert bound(trained, RECIPE.replace("hidden: int = 3", "hidden: int = 7")).plain()["model"]["hidden"] == 7
    finally:
        file.write_text(whole)
