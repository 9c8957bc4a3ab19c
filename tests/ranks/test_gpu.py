"""On a GPU nothing of dtrain's waits for the device while a pass runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.distributed.world import bring_up
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import MeanTable
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Strict(EngineCallback):
    """From the beginning of a pass on, whatever waits for the device is an error."""

    def on_pass_start(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("kind", ["imperative", "declarative"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, kind: str, accumulation: int) -> None:
    reduce = MeanTable.reduce

    def at_the_end(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return reduce(*arguments)

    monkeypatch.setattr(MeanTable, "reduce", at_the_end)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    net.optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)  # type: ignore[assignment]

    def train_step(model: Any, x: Any, y: Any) -> Any:
        loss = (model(x) - y).square().mean()
        if kind == "imperative":
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            loss = loss.detach()
        return loss, loss.detach().sqrt()

    def valid_step(model: Any, x: Any, y: Any) -> Any:
        loss = (model(x) - y).square().mean()
        return loss, loss.sqrt()

    data = TensorDataset(torch.randn(50, 4), torch.randn(50, 1))
    loaders = [DataLoader(data, 8, pin_memory=pinned) for pinned in (True, False)]
    task = Task(net, train_step, loaders[0], valid_step, loaders[1])
    try:
        rows = (
            Engine(
                task, bring_up(), epochs=3, callbacks=Callbacks(Strict()), options=RunOptions(accumulation=accumulation)
            )
            .fit()
            .rows
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows[-1]["loss"] < rows[0]["loss"]
