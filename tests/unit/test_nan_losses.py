"""Losses that are no numbers: where training stops, which samples are named, and steps that are skipped for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import RankBatch, ShardSpec
from dtrain.distributed.world import World, bring_up
from dtrain.engine.metrics import Mean, MeanTable
from dtrain.engine.nan_guard import FiniteLoss, WarnOfValidation
from dtrain.errors import NotFiniteError, UsageError


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


@pytest.mark.parametrize("loss", [torch.tensor(math.nan), math.inf, Mean(torch.tensor(-math.inf), 3)])
def test_stop_names_the_samples(world: World, loss: object) -> None:
    finite = FiniteLoss("stop", nn.Linear(1, 1), world)
    with pytest.raises(NotFiniteError, match=r"indices 4, 7 in the dataset\. Check"):
        finite.check(loss, RankBatch(None, 2, 2, 1.0, indices=torch.tensor([4, 7])))
    with pytest.raises(NotFiniteError, match=r"indices \('a', 1\), b in the dataset"):
        finite.check(loss, RankBatch(None, 2, 2, 1.0, indices=[("a", 1), "b"]))
    with pytest.raises(NotFiniteError, match=r"step is (nan|-?inf)\. Check"):
        finite.check(loss, RankBatch(None, 2, 2, 1.0))
    with pytest.raises(NotFiniteError, match="31 and 8 more in"):
        finite.check(loss, RankBatch(None, 40, 40, 1.0, indices=list(range(40))))
    FiniteLoss("ignore", nn.Linear(1, 1), world).check(loss, RankBatch(None, 2, 2, 1.0))


def test_other_devices_are_looked_at_where_a_line_is_printed(world: World) -> None:
    finite = FiniteLoss("stop", nn.Linear(1, 1), world)
    finite.check(
        torch.empty((), device="meta"), RankBatch(None, 2, 2, 1.0)
    )  # never waited for: meta has no value at all
    table = MeanTable("train")
    table.add({"loss": math.nan}, 2)
    finite.check_running(table)  # nobody has asked
    table.running()
    with pytest.raises(NotFiniteError, match="up to step 1 is nan"):
        finite.check_running(table)
    with pytest.raises(NotFiniteError, match="epoch 3"):
        finite.check_mean(math.inf, "epoch 3")
    finite.check_mean(None, "epoch 3")


def test_a_validation_loss_that_is_no_number_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for loss in (1.0, None, math.nan, math.inf):
        WarnOfValidation().on_epoch_end({"epoch": 3, "val_loss": loss})
    WarnOfValidation().on_epoch_end({"epoch": 4})
    told = [message.partition(".")[0] for message in caplog.messages]
    assert told == ["epoch 3: val_loss is nan", "epoch 3: val_loss is inf"]


def test_skip_leaves_the_step_and_the_buffers_out(world: World) -> None:
    net = nn.BatchNorm1d(2)
    finite = FiniteLoss("skip", net, world)
    rank_batch = RankBatch(None, 2, 2, 1.0)
    finite.begin(rank_batch)
    net(torch.tensor([[1.0, 2.0], [math.nan, 0.0]]))
    finite.check(torch.tensor(math.nan), rank_batch)
    assert finite.refuses_step()
    assert rank_batch.count == 0
    assert torch.equal(net.running_mean, torch.zeros(2))
    assert int(net.num_batches_tracked) == 0
    good = RankBatch(None, 2, 2, 1.0)
    finite.begin(good)
    net(torch.ones(2, 2))
    finite.check(torch.tensor(1.0), good)
    assert not finite.refuses_step()
    assert (good.count, int(net.num_batches_tracked)) == (2, 1)
    with pytest.raises(UsageError, match=r"train\.nan=skip"):
        finite.refuse_imperative()


@pytest.mark.parametrize("fetch_batches", [True, False])
def test_shares_carry_the_indices_of_their_samples(fetch_batches: bool) -> None:
    loader = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True)
    how = ShardSpec(1, 2, "per_rank", fill=True)
    iter_batches = list(ShardedLoader(loader, how, 0, "train", fetch_batches=fetch_batches).iter_batches(1))
    assert [[int(i) for i in rank_batch.indices] for rank_batch in iter_batches] == [
        rank_batch.batch[0].tolist() for rank_batch in iter_batches
    ]
