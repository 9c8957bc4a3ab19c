"""Buffers that a rank fills from its own part of the batch are a warning: on several ranks rank 0's is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Running(nn.Module):
    """Keeps a mean of what it sees: of each rank's part, or of all."""

    def __init__(self, *, summed: bool) -> None:
        super().__init__()
        self.summed = summed
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.detach().mean(0)
            if self.summed and dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.mean = self.mean.lerp(mean, 0.5)
            self.calls += 1
        return x - self.mean


class Instances(nn.Module):
    """(batch, 4) as samples of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, 2, 2)).flatten(1)


OWN: dict[str, Callable[[], nn.Module]] = {
    "the buffer 0.mean is filled": lambda: Running(summed=False),
    "the buffer 0.norm.running_mean and 1 more is filled": Instances,
}
COMMON: list[Callable[[], nn.Module]] = [
    lambda: Running(summed=True),
    lambda: nn.BatchNorm1d(4),
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
]


def logged(world: Any) -> list[list[str]]:
    from dtrain import train_model

    found = []
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for make in (*OWN.values(), *COMMON):
        torch.manual_seed(1)
        net = nn.Sequential(make(), nn.Linear(4, 1)).double()
        net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("dtrain").addHandler(handler)
        try:
            train_model(
                net,
                2,
                DataLoader(TensorDataset(x), 6),
                train_step=lambda m, x: m(x).square().mean(),
                batch="global",
                verbose=False,
                world=world,
            )
        finally:
            logging.getLogger("dtrain").removeHandler(handler)
        found.append(records)
    return found


def test_buffers_that_ranks_fill_differently_are_a_warning() -> None:
    main, other = run_ranks(logged, 2)
    assert not any(other)
    for records, said in zip(main, OWN, strict=False):
        assert len(records) == 1
        assert records[0].startswith(said)
    assert main[len(OWN) :] == [[]] * len(COMMON)
