"""Loops of one's own over two prepared loaders at once, as `zip(labelled, unlabelled)`."""

from __future__ import annotations

from typing import Any

import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def numbers(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nets() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(3, 3).double(), nn.Linear(3, 1).double(), nn.Linear(3, 1).double()]


def loss_of(net: list[Any], x: Tensor, y: Tensor) -> Tensor:
    return net[1](net[0](x)).square().mean() + net[2](net[0](y)).sub(1).square().mean()


def loops(world: Any) -> list[Any]:
    """A net without a loader between two that have one; then one net with both loaders; equal batches, or not."""
    import dtrain
    from dtrain.api.prepared import PROCESS, Process
    from dtrain.errors import StepError

    found: list[Any] = []
    for one_net in (False, True):
        for samples in (12, 9):
            vars(PROCESS).update(vars(Process(world=world)))
            net = nets()
            loaders = [DataLoader(TensorDataset(numbers(n, n)), 4) for n in (12, samples)]
            if one_net:
                made = nn.ModuleList(net)
                _, *prepared = dtrain.prepare(made, *loaders, batch="global")
            else:
                dtrain.prepare(net[0], batch="global")
                prepared = [dtrain.prepare(net[1 + k], loader, batch="global")[1] for k, loader in enumerate(loaders)]
            optimizer = torch.optim.SGD([p for one in net for p in one.parameters()], lr=0.1)
            try:
                for (x,), (y,) in zip(*prepared, strict=True):
                    optimizer.zero_grad()
                    loss_of(net, x, y).backward()
                    optimizer.step()
            except StepError as error:
                found.append(str(error))
            else:
                found.append([p.flatten().tolist() for one in net for p in one.parameters()])
    return found


def test_a_net_that_two_loops_train_gets_one_weight_or_is_refused() -> None:
    net = nets()
    optimizer = torch.optim.SGD([p for one in net for p in one.parameters()], lr=0.1)
    for x, y in zip(numbers(12, 12).split(4), numbers(12, 12).split(4), strict=True):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    expected = [p.flatten().tolist() for one in net for p in one.parameters()]
    for rank in run_ranks(loops, 2):
        for equal, unequal in (rank[:2], rank[2:]):
            for here, there in zip(equal, expected, strict=True):
                torch.testing.assert_close(torch.tensor(here), torch.tensor(there), rtol=1e-9, atol=1e-12)
            assert "two loops train one model" in unequal
            assert "this rank has 2 of 4 samples in one and" in unequal
