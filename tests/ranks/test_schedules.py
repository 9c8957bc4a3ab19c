"""Learning-rate schedules count optimizer steps or epochs, never ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# 19 samples in global batches of 4 are 5 batches; two a step make 3 optimizer steps an epoch.
STEPS = {1: 5, 2: 3}


def train(world) -> dict[str, Any]:
    """One rank: the lr column, and the rate that each optimizer step used, for schedules that halve the rate."""
    import dtrain

    found = {}
    for interval in ("epoch", "step"):
        for accumulation in (1, 2):
            for kind in ("imperative", "declarative"):
                net = nn.Linear(2, 1)
                used: list[float] = []
                optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
                optimizer.register_step_pre_hook(lambda o, *_, used=used: used.append(o.param_groups[0]["lr"]))
                net.optimizer = optimizer

                def step(model, x, y, kind=kind):
                    loss = model(x).mean()
                    if kind == "imperative" and model.training:
                        model.optimizer.zero_grad()
                        loss.backward()
                        model.optimizer.step()
                    return loss if kind == "declarative" else loss.item()

                frame = dtrain.train_model(
                    net,
                    3,
                    DataLoader(TensorDataset(torch.ones(19, 2), torch.ones(19)), batch_size=4),
                    train_step=step,
                    scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
                    scheduler_interval=interval,
                    accumulation=accumulation,
                    batch="global",
                    verbose=False,
                    world=world,
                )
                found[f"{interval} {accumulation} {kind}"] = [frame["lr"].tolist(), used]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_lr_column_is_the_same_on_any_number_of_ranks(ranks: int) -> None:
    for found in run_ranks(train, ranks):
        assert len(found) == 8
        for case, (column, used) in found.items():
            interval, accumulation, _ = case.split()
            steps = STEPS[int(accumulation)]
            halvings = [k // steps if interval == "epoch" else k for k in range(3 * steps)]
            assert used == [0.5**k for k in halvings], case
            assert column == used[steps - 1 :: steps], "the rate of the epoch's last step"
