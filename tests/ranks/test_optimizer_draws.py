"""What an optimizer draws in its step is for the parameters, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH, EPOCHS = 23, 6, 2


class Langevin(torch.optim.Optimizer):
    """Adds noise to each parameter, drawn from torch's stream or from a generator."""

    def __init__(self, parameters: Any, generator: torch.Generator | None = None) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        """Steps, after the closure."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            noise = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64)
            parameter.add_(-0.05 * parameter.grad + 0.1 * noise)


def pieces(seeded: bool) -> tuple[nn.Module, Langevin, TensorDataset]:
    """A net with biases of as many numbers as parts of the batch have samples."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(3, 2), nn.Tanh(), nn.Dropout(0.3 * (not seeded)), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)
    ).double()
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = Langevin(net.parameters(), torch.Generator().manual_seed(4) if seeded else None)
    return net, optimizer, TensorDataset(x, x[:, :1] * x[:, 1:2])


def mean_square(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss."""
    return (net(x) - y).square().mean()  # type: ignore[no-any-return]


def trained(world: Any, way: str) -> list[float]:
    """The weights after a run."""
    from dtrain import train_model

    net, optimizer, data = pieces(way == "seeded")
    net.optimizer = optimizer  # type: ignore[assignment]

    def step(model: Any, x: Tensor, y: Tensor) -> Tensor:
        if way not in {"imperative", "closure"}:
            return mean_square(model, x, y)

        def run() -> Tensor:
            optimizer.zero_grad()
            loss = mean_square(model, x, y)
            loss.backward()
            return loss

        loss = run()
        optimizer.step(*([run] if way == "closure" else []))
        return loss.detach() + 0 * torch.randn(len(x), 1, dtype=torch.float64).mean()

    train_model(
        net,
        EPOCHS,
        DataLoader(data, BATCH),
        train_step=step,
        batch="global",
        same_draws=True,
        verbose=False,
        world=world,
    )
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


def in_a_plain_loop() -> list[float]:
    """The same of noise from a generator, without dtrain."""
    net, optimizer, data = pieces(seeded=True)
    for _ in range(EPOCHS):
        for x, y in DataLoader(data, BATCH):
            optimizer.zero_grad()
            mean_square(net, x, y).backward()
            optimizer.step()
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


WAYS = ("declarative", "imperative", "closure", "seeded")


def all_ways(world: Any) -> dict[str, list[float]]:
    """Of each way to step."""
    return {way: trained(world, way) for way in WAYS}


@pytest.mark.parametrize("ranks", [2, 3])
def test_noise_of_an_optimizer_is_that_of_one_process(ranks: int) -> None:
    (alone,) = run_ranks(all_ways, 1)
    np.testing.assert_allclose(alone["seeded"], in_a_plain_loop(), rtol=1e-9)
    for together in run_ranks(all_ways, ranks):
        for way in WAYS:
            np.testing.assert_allclose(together[way], alone[way], rtol=1e-9, atol=1e-12, err_msg=way)
