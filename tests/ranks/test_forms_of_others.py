"""What only another rank sees of its losses is told by rank 0, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader


def logged(world: Any, seeing: list[int]) -> list[str]:
    """What a run logs whose loss is a masked mean on some ranks."""
    from dtrain import train_model

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain.engine.loss_form").addHandler(handler)
    torch.manual_seed(1)
    net = nn.Linear(3, 1).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]

    def step(model: Any, x: Tensor) -> Tensor:
        loss = model(x).square()[:, 0]
        mask = torch.arange(len(x)) != 1
        return loss[mask].mean() if world.rank in seeing else loss.sum() * 0

    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    train_model(net, 1, DataLoader(x, 8), train_step=step, batch="global", verbose=False, world=world)
    return told


@pytest.mark.parametrize("seeing", [[1], [0], [0, 1, 2], [1, 2], []])
def test_a_form_that_some_ranks_see_is_a_warning_of_rank_0(seeing: list[int]) -> None:
    first, *others = run_ranks(logged, 3, seeing=seeing)
    assert len(first) == (len(seeing) > 0)
    assert all("that are selected from" in text for text in first)
    assert others == [[], []]
