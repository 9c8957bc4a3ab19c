"""Random augmentation that is seeded by sample and epoch is the same on any number of ranks and workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Noisy(Dataset):
    """As docs/exactness.md shows it."""

    epoch = 0

    def set_epoch(self, epoch):  # dtrain calls it
        self.epoch = epoch

    def __len__(self):
        return 19

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1_000_000 * self.epoch + index)
        return torch.tensor([float(index)]) + torch.randn(1, generator=generator)


def train(world, workers: int) -> dict[str, Any]:
    """One rank: two epochs over noisy samples; the noise that it saw, and the history."""
    import dtrain

    seen: list[list[float]] = []
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.001)

    def train_step(model, x):
        seen.append([round(value, 4) for value in x.flatten().tolist()])
        return (model(x) - 1).square().mean()

    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
    frame = dtrain.train_model(net, 2, loader, train_step=train_step, batch="global", verbose=False, world=world)
    return {"seen": seen, "loss": frame["loss"].tolist(), "weight": net.weight.item()}


@pytest.mark.parametrize(("ranks", "workers"), [(3, 0), (2, 2)])
def test_noise_seeded_by_sample_and_epoch_knows_no_ranks(ranks: int, workers: int) -> None:
    (alone,) = run_ranks(train, 1, workers=0)
    together = run_ranks(train, ranks, workers=workers)
    samples = [sample for step in alone["seen"] for sample in step]
    assert len(set(samples)) == 2 * 19, "each epoch draws anew"
    # A rank without a sample in the last step takes part with another rank's.
    assert {sample for one in together for step in one["seen"] for sample in step} == set(samples)
    for one in together:
        assert one["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert one["weight"] == pytest.approx(alone["weight"], rel=1e-6)
