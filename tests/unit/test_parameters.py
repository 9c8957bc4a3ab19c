"""Frozen parameters and groups of the optimizer, by patterns of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config import load_settings
from dtrain.engine.train_step import Task
from dtrain.errors import ConfigError
from dtrain.recipe.loader import bind, load_recipe

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 1, bias=False)
    )

def build_dataloaders():
    return DataLoader(TensorDataset(torch.ones(4, 2, 5), torch.ones(4, 1))), None

def build_optimizer(model, lr: float = 0.1, weight_decay: float = 0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)

def build_scheduler(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

def train_step(model, x, y):
    return ((model(x) - y) ** 2).mean()
"""


def bound(folder: Path, *words: str) -> Task:
    file = folder / "mine.py"
    file.write_text(RECIPE)
    settings = load_settings(str(file), list(words), {})
    return bind(load_recipe(settings.config.recipe, settings.base), settings)


def options_of(task: Task, *keys: str) -> dict[str, tuple[Any, ...]]:
    """Each parameter's options, by its name."""
    names = {id(parameter): name for name, parameter in task.module.named_parameters()}
    assert task.optimizer is not None
    return {
        names[id(parameter)]: tuple(group[key] for key in keys)
        for group in task.optimizer.param_groups
        for parameter in group["params"]
    }


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    task = bound(tmp_path, "parameters.no_decay=[norms, biases]")
    decays = {name: decay for name, (decay,) in options_of(task, "weight_decay").items()}
    assert decays == {
        "0.weight": 0.01, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0,
        "3.weight": 0.01, "3.bias": 0.0, "4.weight": 0.0, "4.bias": 0.0, "5.weight": 0.01,
    }  # fmt: skip
    assert task.scheduler.base_lrs == [0.1, 0.1], "the scheduler knows the groups"


def test_groups_have_options_of_their_own_and_the_first_counts_most(tmp_path: Path) -> None:
    groups = "parameters.groups=[{match: '3.*', lr: 0.001}, {match: '*.weight', lr: 0.02, betas: [0.8, 0.9]}]"
    found = options_of(bound(tmp_path, groups, "no_decay=['3.*']"), "lr", "weight_decay", "betas")
    assert found["3.weight"] == (0.001, 0.0, [0.8, 0.9])
    assert found["3.bias"] == (0.001, 0.0, (0.9, 0.999))
    assert found["0.weight"] == (0.02, 0.01, [0.8, 0.9])
    assert found["0.bias"] == (0.1, 0.01, (0.9, 0.999))


def test_frozen_parameters_keep_their_values(tmp_path: Path) -> None:
    import dtrain

    task = bound(tmp_path, "parameters.freeze=['0.*', norms]")
    before = {name: parameter.detach().clone() for name, parameter in task.module.named_parameters()}
    dtrain.train_model(
        task.module, 2, task.dl_train, train_step=task.train_step, optimizer=task.optimizer, verbose=False, cpu=True
    )
    kept = {name for name, parameter in task.module.named_parameters() if torch.equal(parameter, before[name])}
    assert kept == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("freeze=['7.*']", r"parameters.freeze = '7.\*' \(command line\): no parameter of the model has this name"),
        ("freeze=['0.weigt']", "Did you mean '0.weight'"),
        ("freeze=['*']", "no parameter of the model would be trained"),
        ("no_decay=[normz]", "Did you mean 'norms'"),
        ("parameters.groups=[{match: '0.*', rate: 1}]", "AdamW has no option 'rate'. It has lr, betas"),
        ("parameters.groups=[{lr: 1}]", "a group is {match: PATTERN"),
        ("parameters.groups=[{match: '0.*'}]", "a group is {match: PATTERN"),
    ],
)
def test_what_matches_nothing_is_told(tmp_path: Path, word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bound(tmp_path, word)


def test_a_net_without_a_known_optimizer_has_no_groups(tmp_path: Path) -> None:
    from dtrain.config.schema import ParametersConfig
    from dtrain.recipe.param_groups import regroup

    with pytest.raises(ConfigError, match="need an optimizer"):
        regroup(None, nn.Linear(1, 1), ParametersConfig(no_decay=["biases"]), {})
