"""What is sent between the ranks: one sum a split and epoch, and comparisons of the ranks at growing distances."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.commands import clean_environment
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.model.gradients.drift import is_due

_COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "barrier", "gather", "reduce", "all_gather_into_tensor")


def count_collectives(world, epochs: int, n: int, values: int) -> list[str]:
    """One rank: the collectives of a run, DDP's own sums of gradients not counted."""
    import dtrain

    called: list[str] = []

    def noted(name: str) -> Any:
        before = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return before(*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, noted(name))
    net = nn.Linear(2, 1)

    def step(model, x, y):
        loss = (model(x) - y).square().mean()
        return {"loss": loss} | {f"value{number}": loss.detach() * number for number in range(values)}

    loader = DataLoader(TensorDataset(torch.ones(n, 2), torch.ones(n, 1)), batch_size=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dtrain.train_model(
        net, epochs, loader, loader, train_step=step, valid_step=step, optimizer=optimizer, verbose=False, world=world
    )
    return called


@pytest.mark.parametrize(("n", "values"), [(7, 0), (200, 9)])
def test_one_sum_a_split_and_epoch(n: int, values: int) -> None:
    few, many = (run_ranks(count_collectives, 2, epochs=epochs, n=n, values=values) for epochs in (1, 4))
    for one, four in zip(few, many, strict=True):
        further, steps = four[len(one) :], -(-n // (2 * 3))
        compared = sum(is_due(step) for step in range(steps + 1, 4 * steps + 1))
        assert compared == 4, "after train steps at growing distances, whatever their number"
        assert further == ["all_reduce"] * (3 * 3 + compared), "a train and a validation sum and a comparison an epoch"


def views(world) -> list[Any]:
    """One rank: what tensors that are views, and the memory around them, hold after collectives."""
    mine = float(world.rank + 1)
    whole = torch.full((4, 3), mine)
    stretched = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1) * mine
    flags, count = torch.tensor([world.is_main, True])[::2], torch.tensor(world.rank)
    world.broadcast_([whole[:, 1], whole.T[2:], stretched, flags, count])
    summed = torch.full((3, 4), mine)
    assert world.sum_(summed[:, ::2]).data_ptr() == summed.data_ptr()
    return [whole.tolist(), stretched.flatten().tolist(), flags.tolist(), int(count), summed.tolist()]


def test_tensors_that_are_views_are_sent_and_nothing_around_them_is_written() -> None:
    stretched = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1).flatten().tolist()
    for rank, (whole, moved, flags, count, summed) in enumerate(run_ranks(views, 2)):
        mine = float(rank + 1)
        assert whole == [[mine, 1.0, 1.0]] * 4, "the first column is this rank's own"
        assert moved == stretched and flags == [True] and count == 0
        assert summed == [[3.0, mine, 3.0, mine]] * 3


FAKE = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from dtrain.rundir.history import History
from dtrain.engine.metrics import MeanTable
from dtrain.distributed.world import World

size = int(sys.argv[1])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
world = World(0, size, 0, size, torch.device("cpu"), None)
sent, calls = [], 0
reduce_, gather = dist.all_reduce, dist.all_gather

def all_reduce(tensor, *args, **kwargs):
    sent.append(tensor.numel() * tensor.element_size())
    return reduce_(tensor, *args, **kwargs)

def all_gather(*_, **__):
    raise AssertionError("something of every rank came to this one")

def count(_frame, event, _arg):
    global calls
    calls += event in ("call", "c_call")

dist.all_reduce, dist.all_gather = all_reduce, all_gather
history = History(sys.argv[2])
table = MeanTable("train", ("loss", "accuracy"))
for step in range(10):
    table.add({"loss": 0.5, "accuracy": 0.25}, 4)
sys.setprofile(count)
result, _ = table.reduce(world, 1.0, (1.0, 1.0))
history.append({"epoch": 1, **result.means})
sys.setprofile(None)
print(sent, calls)
"""


def test_an_epoch_costs_rank_0_as_much_at_1024_ranks_as_at_2(tmp_path) -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", FAKE, str(size), str(tmp_path / f"{size}.csv")],
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for size in (2, 1024)
    ]
    assert told[0] == told[1]
    assert told[0].startswith("[72] ")  # bytes: two sums and counts, who left, samples, seconds, two extras
