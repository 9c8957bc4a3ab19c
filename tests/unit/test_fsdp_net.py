"""Nets and optimizers that cannot be sharded are refused by name, before anything is changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import dtrain as library
from dtrain.api.prepared import PROCESS
from dtrain.distributed.fsdp_settings import Sharding
from dtrain.distributed.world import bring_up
from dtrain.errors import UsageError
from dtrain.model.fsdp import check_net, optimizers_of, refuse_others


def net_with(**parts: nn.Module | nn.Parameter) -> nn.Module:
    net = nn.Linear(2, 2)
    for name, part in parts.items():
        setattr(net, name, part)
    return net


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (
            net_with(scale=nn.Parameter(torch.tensor(1.0))),
            r"the parameter scale has no dimension to shard.*torch.zeros\(1",
        ),
        (
            net_with(table=nn.Embedding(3, 2, sparse=True)),
            r"table \(Embedding\) has sparse gradients. Make it with sparse=F",
        ),
        (net_with(far=nn.Linear(2, 2, device="meta")), "the parameter far.weight has no values"),
        (
            net_with(wave=nn.Parameter(torch.zeros(2, dtype=torch.complex64))),
            "the parameter wave is of type torch.complex",
        ),
    ],
)
def test_a_net_that_cannot_be_sharded_is_refused(net: nn.Module, told: str) -> None:
    check_net(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=told):
        check_net(net)


def test_all_optimizers_of_the_net_are_found_and_checked() -> None:
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    own = [torch.optim.SGD([net.weight], lr=0.1), torch.optim.AdamW([{"params": [net.bias]}])]
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    assert sorted(map(id, optimizers_of(names))) == sorted(map(id, own)) and foreign
    for kind in (torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.Rprop):
        kept = kind(net.parameters())
        with pytest.raises(UsageError, match=f"^{kind.__name__} cannot step on a sharded model"):
            optimizers_of(names)
        del kept


def test_an_average_with_whole_weights_is_refused_with_the_remedy() -> None:
    refuse_others([("average", torch.amp.GradScaler("cpu"))])
    with pytest.raises(UsageError, match=r"average \(AveragedModel\) is a separate model.*train.ema_decay"):
        refuse_others([("average", AveragedModel(nn.Linear(2, 2)))])


def test_the_styles_that_hand_the_net_back_say_that_they_do_not_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    world = replace(bring_up(cpu=True), size=2, sharding=Sharding())
    monkeypatch.setattr(PROCESS, "world", world)
    net = nn.Linear(2, 1)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]
    loader = DataLoader(TensorDataset(torch.ones(4, 2), torch.ones(4, 1)), batch_size=2)
    with pytest.raises(UsageError, match=r"^train_model does not support FSDP.*launch/multi_gpu.yaml"):
        library.train_model(net, 1, loader, train_step=lambda m, x, y: (m(x) - y).mean(), world=world)
    with pytest.raises(UsageError, match=r"^KerasModel.fit does not support FSDP"):
        library.KerasModel(net, loss_fn=nn.functional.mse_loss).fit(1, loader, world=world)
    with pytest.raises(UsageError, match=r"^dtrain.prepare does not support FSDP"):
        library.prepare(net, loader)
