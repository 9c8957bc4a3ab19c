"""The step gets the user's own net, and ranks that come to train different things are found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def regression_data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return x, (x**2).sum(dim=1, keepdim=True)


class OddNet(nn.Module):
    """A net whose attributes are named like DDP's own."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.device, self.logger, self.join = 8, "here", "mine", None
        self.module = nn.Linear(4, 1)
        self.hook_calls = 0
        self.register_forward_hook(lambda *_: setattr(self, "hook_calls", self.hook_calls + 1))

    def forward(self, x):
        return self.module(x)

    def loss(self, x, y):
        return ((self(x) - y) ** 2).mean()


def look_at_the_net(world) -> dict[str, Any]:
    from dtrain.api.function import train_model

    torch.manual_seed(0)
    net = OddNet()
    seen: dict[str, Any] = {}

    def train_step(model, x, y):
        copied = copy.deepcopy(model)
        seen.update(
            same=model is net,
            names=[name for name, _ in model.named_parameters()],
            state=list(model.state_dict()),
            values=[model.dim, model.device, model.logger],
            copy_is_apart=bool((copied(x.float()) == model.module(x.float())).all())
            and copied.module is not net.module,
        )
        model.tmp = 1
        del model.tmp
        return {"loss": model.loss(x.float(), y.float())}

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*regression_data(8)), batch_size=2)
    train_model(net, 1, loader, train_step=train_step, optimizer=optimizer, verbose=False, world=world)
    return seen | {"hooks": net.hook_calls, "weights": net.module.weight.tolist(), "clean": "forward" not in vars(net)}


def test_the_step_gets_the_users_own_net_on_any_number_of_ranks() -> None:
    for ranks in (1, 2):
        for seen in run_ranks(look_at_the_net, ranks):
            assert seen["same"]
            assert seen["names"] == seen["state"] == ["module.weight", "module.bias"]
            assert seen["values"] == [8, "here", "mine"]
            assert seen["copy_is_apart"]
            assert seen["clean"]
            steps = 4 // ranks
            assert seen["hooks"] == 2 * steps, "the net's hooks run once a call: of the net, and of its copy"


def break_the_task(world, how: str) -> str:  # noqa: C901
    """Each way in which ranks can come to train different things."""
    import dtrain
    from dtrain.api.function import train_model
    from dtrain.errors import DtrainError

    torch.manual_seed(0)
    valid = None
    net = nn.Linear(4, 1).double()
    data = TensorDataset(*regression_data(16))
    outside = nn.Linear(1, 1).double()
    parameters = {"foreign": [*net.parameters(), *outside.parameters()], "other": list(outside.parameters())}
    optimizer = torch.optim.SGD(parameters.get(how, list(net.parameters())), lr=0.1)
    loader = DataLoader(data, batch_size=4)
    if how == "unequal":
        loader = DataLoader(TensorDataset(*regression_data(16 + 4 * world.rank)), batch_size=4)
    if how == "shapes":
        net = nn.Linear(4, 1 + world.rank).double()
    if how == "order":
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(world.rank))
    if how == "valid-order":
        generator = torch.Generator().manual_seed(world.rank)
        valid = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    if how == "own-sharding":
        x, y = regression_data(16)
        loader = [(x[i : i + 4], y[i : i + 4]) for i in range(4 * world.rank, 16, 8)]
    if how == "unused":
        net.register_parameter("idle", nn.Parameter(torch.ones(3).double()))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def train_step(model, x, y):
        loss = ((outside(model(x)) - y) ** 2).mean()
        if how == "imperative-mean":
            loss.backward()
            model.optimizer.step()
            return dtrain.Mean(loss.detach() * len(x), len(x))
        return {"loss": loss}

    def valid_step(model, x, y):
        return {"loss": 1.0}

    try:
        train_model(
            net,
            2,
            loader,
            valid,
            train_step=train_step,
            valid_step=valid_step,
            optimizer=optimizer,
            verbose=False,
            world=world,
        )
    except DtrainError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("foreign", "2 parameters that are not the model's"),
        ("other", "none of the model's parameters"),
        ("unequal", "number of train samples is not the same on all ranks: 16 on rank 0, 20 on rank 1"),
        ("shapes", "net's parameters is not the same"),
        ("order", "draw the train samples in different orders"),
        ("valid-order", "draw the valid samples in different orders"),
        ("own-sharding", "draw the train samples in different orders"),
        ("imperative-mean", "returns its loss as dtrain.Mean"),
        ("unused", "trained"),
    ],
)
def test_ranks_that_train_different_things_are_found(how: str, told: str) -> None:
    for answer in run_ranks(break_the_task, 2, how=how):
        assert told in answer


class SeesDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.seen: dict[bool, str] = {}

    def forward(self, x):
        out = self.linear(x)
        self.seen[self.training] = str(out.dtype)
        return out


def precision_of_passes(world) -> dict[str, Any]:
    from dtrain.api.function import train_model

    net = SeesDtype()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(model, x, y):
        return ((model(x.float()) - y.float()) ** 2).mean()

    loader = DataLoader(TensorDataset(*regression_data(4)), batch_size=2)
    train_model(
        net, 1, loader, loader, train_step=step, valid_step=step, optimizer=optimizer, world=world, verbose=False
    )
    return {"train": net.seen[True], "valid": net.seen[False], "left": "forward" in vars(net)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerates_bf16_holds_for_training_and_validation_alike(ranks: int) -> None:
    expected = {"train": "torch.bfloat16", "valid": "torch.bfloat16", "left": False}
    assert run_ranks(precision_of_passes, ranks, env={"ACCELERATE_MIXED_PRECISION": "bf16"}) == [expected] * ranks
