"""DDP leads a call's tensors to the rank's own device, whatever its number is beside the local rank's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.data.partition import RankBatch
from dtrain.model.ddp import Replica


class AsOnGpus(DistributedDataParallel):
    """Notes the devices as it does for a net on a GPU; for one on the CPU it refuses them."""

    def __init__(self, module: nn.Module, device_ids: Any = None, output_device: Any = None, **more: Any) -> None:
        super().__init__(module, **more)
        self.device_ids, self.output_device = device_ids, output_device


def train_a_step(world) -> list[Any]:
    """One rank, which like each other sees one device, number 0: its DDP's devices, and a gradient."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(world.accelerator), "multi_device", True)
        patched.setattr(torch.nn.parallel, "DistributedDataParallel", AsOnGpus)
        net = nn.Linear(2, 1, bias=False)
        replica = Replica(net, replace(world, device=torch.device("cpu", 0)), averaging="ddp")
        replica.gradients.begin(1.0, last=True)
        replica.gradients.abandon()
        ddp = replica._redirection.ddp
    rank_batch = RankBatch(None, 1, 2, 1.0)
    with replica.averaging(rank_batch), replica.training():
        net(torch.full((1, 2), float(world.rank))).sum().backward()
    assert net.weight.grad is not None
    return [type(ddp).__name__, ddp.device_ids, ddp.output_device, net.weight.grad.tolist()]


def test_each_rank_may_see_its_gpu_as_number_0() -> None:
    """As with srun's --gpus-per-task=1; Accelerate would give DDP the local rank, a device that is not there."""
    assert run_ranks(train_a_step, 2) == [["AsOnGpus", [0], 0, [[0.5, 0.5]]]] * 2
