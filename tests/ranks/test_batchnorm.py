"""BatchNorm on several ranks: synced in training, it is that of one process; in validation it touches nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class OwnBatchNorm(nn.BatchNorm1d):
    """A user's own kind of BatchNorm."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, momentum=None), nn.Tanh())
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), OwnBatchNorm(5, affine=False), nn.Tanh())
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def train(world, imperative: bool, n: int, synced: bool = True) -> dict[str, Any]:
    """One rank: trains a net with two kinds of BatchNorm on ragged batches; returns all that it learnt."""
    import dtrain

    torch.manual_seed(3)
    net = Net().double()
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 2, 5, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, x.sum(dim=(1, 2))[:, None] ** 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)

    def step(model, features, labels):
        loss = ((model(features) - labels) ** 2).mean()
        if imperative and model.training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()
        return loss

    frame = dtrain.train_model(
        net,
        3,
        DataLoader(data, batch_size=8, shuffle=True),
        DataLoader(data, batch_size=5),
        train_step=step,
        valid_step=step,
        optimizer=optimizer,
        batch="global",
        sync_batchnorm=synced,
        verbose=False,
        world=world,
    )
    return {
        "state": {name: value.flatten().tolist() for name, value in net.state_dict().items()},
        "rows": frame[["loss", "val_loss"]].to_numpy().tolist(),
    }


@pytest.mark.parametrize("imperative", [False, True])
@pytest.mark.parametrize(("ranks", "n"), some([(3, 18), (4, 27)], [(2, 19)]))
def test_synced_batchnorm_is_that_of_one_process(imperative: bool, ranks: int, n: int) -> None:
    """The last batches have 3, 2 and 3 samples: parts of one, and ranks that take part with weight 0."""
    (alone,) = run_ranks(train, 1, imperative=imperative, n=n)
    for together in run_ranks(train, ranks, imperative=imperative, n=n):
        for name, values in alone["state"].items():
            assert together["state"][name] == pytest.approx(values, rel=1e-7, abs=1e-9), name
        for row, expected in zip(together["rows"], alone["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-8)


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    return net, torch.randn(12, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def flat(net: nn.Module) -> list[float]:
    return [value for tensor in net.state_dict().values() for value in tensor.double().flatten().tolist()]


def unsynced(world, same_draws: bool) -> list[float]:
    import dtrain

    net, x = small()
    dtrain.train_model(
        net,
        2,
        DataLoader(TensorDataset(x), batch_size=6),
        train_step=lambda model, x: (model(x) - x[:, :1]).square().mean(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.2),
        batch="global",
        same_draws=same_draws,
        verbose=False,
        world=world,
    )
    return flat(net)


def of_parts(cuts: list[tuple[int, int]]) -> list[float]:
    """In one process: batches of 6 in two parts, each with statistics of its own; the first part's are kept."""
    net, x = small()
    for number, cut in enumerate(cuts):
        parts = x[6 * (number % 2) :][:6].split(cut)
        gradients = []
        for part, of in zip(parts, (net, copy.deepcopy(net)), strict=True):
            loss = (of(part) - part[:, :1]).square().mean()
            gradients.append(torch.autograd.grad(loss, list(of.parameters())))
        with torch.no_grad():
            for parameter, first, second in zip(net.parameters(), *gradients, strict=True):
                parameter.sub_(0.2 * (first * cut[0] + second * cut[1]) / 6)
    return flat(net)


def test_the_parts_that_statistics_are_of_are_unequal_in_the_first_step_of_common_random_numbers() -> None:
    equal, unequal = (3, 3), (4, 2)
    expected = {True: of_parts([unequal, equal, equal, equal]), False: of_parts([equal] * 4)}
    assert expected[True] != pytest.approx(expected[False], abs=1e-3)
    for same_draws in (True, False):
        assert run_ranks(unsynced, 2, same_draws=same_draws)[0] == pytest.approx(expected[same_draws], abs=1e-9)


RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model():
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

def build_dataloaders():
    x = torch.randn(10, 2)
    return DataLoader(TensorDataset(x, x[:, :1]), batch_size=2), None

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, x, y):
    return ((model(x) - y) ** 2).mean()
"""


def test_a_part_of_one_sample_names_the_switch_and_the_switch_helps(dtrain: Dtrain) -> None:
    (dtrain.folder / "small.py").write_text(RECIPE)
    arguments = ("train", "small.py", "-n", "2", "--cpu", "batch=global", "epochs=1")
    refused = dtrain(*arguments)
    assert refused.code == 1
    assert "train.sync_batchnorm=true" in refused.err
    assert dtrain(*arguments, "sync_batchnorm=true").code == 0


def test_parity_finds_batchnorm_and_the_switch_makes_it_equal(dtrain: Dtrain) -> None:
    (dtrain.folder / "small.py").write_text(RECIPE.replace("batch_size=2", "batch_size=4"))
    found = dtrain("check", "parity", "small.py", "-n", "2")
    assert found.code == 1
    assert "train.sync_batchnorm=true" in found.out
    equal = dtrain("check", "parity", "small.py", "-n", "2", "train.sync_batchnorm=true")
    assert equal.code == 0, equal.text
