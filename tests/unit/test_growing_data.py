"""What depends on earlier calls: datasets that change in place with each epoch, ranks whose steps take more and more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callbacks import on
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dtrain.checkpoint.locate import Parts, find_good, read
from dtrain.checkpoint.saver import Checkpointer
from dtrain.checkpoint.state import restore
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.world import bring_up
from dtrain.engine import agreed_steps
from dtrain.engine.agreed_steps import AgreedSteps
from dtrain.engine.callback import Order
from dtrain.engine.loop import Engine
from dtrain.engine.position import TrainPosition
from dtrain.engine.train_step import Task
from dtrain.errors import StepError, StopRequested


class Grows(Dataset):
    """It has one sample more after each call, in the opposite order."""

    def __init__(self) -> None:
        self.items = [0.1, 0.2, 0.3]

    def set_epoch(self, epoch: int) -> None:
        self.items.append(1.0 + len(self.items))
        self.items.reverse()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([self.items[index]])


def train(folder: Path, until: int) -> list[Any]:
    """Goes on from the last checkpoint there is, to so many optimizer steps; 0 for all epochs. Returns the rows."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1)

    def step(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": model(x).square().mean(), "mean": x.mean()}

    task = Task(
        net, step, DataLoader(Grows(), 2), step, DataLoader(Grows(), 2), torch.optim.SGD(net.parameters(), 0.01)
    )
    engine = Engine(task, bring_up(cpu=True), epochs=4)
    found = find_good(folder)
    if found is not None:
        loaded = read(found.saved.path).shared(engine.world).loaded() if until >= 0 else Parts().loaded()
        engine.history.rows = list(loaded.run["rows"])
        restore(engine, loaded.weights, loaded.run, loaded.ranks)
    keeper = Checkpointer(engine, folder, CheckpointConfig(), lambda: {"format": 1, "ranks": 1})
    keeper.attach()

    def stop(place: TrainPosition) -> None:
        if until and place.updates == until:
            raise StopRequested("saved")

    engine.callbacks.add(on(Order.LAST, on_save_point=stop))
    try:
        engine.fit()
    except StopRequested:
        pass
    finally:
        keeper.on_train_end()
    return [[row[name] for name in ("loss", "mean", "val_loss", "val_mean")] for row in engine.history.rows]


def test_a_dataset_that_grows_in_place_is_resumed_as_it_was(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 0)
    assert len({row[1] for row in whole}) == 4
    train(tmp_path / "parts", 6)  # within the third epoch
    train(tmp_path / "parts", 8)
    assert train(tmp_path / "parts", 0) == whole


def test_a_rank_whose_steps_take_more_than_before_waits_for_the_others_with_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world: Any = SimpleNamespace(rank=1, size=2, gather_json=lambda value: [value, value])
    for missing in ([0], []):
        waited: list[str] = []

        def wait(_: Any, number: Any, what: str, waited: list[str] = waited, missing: Any = missing) -> list[int]:
            waited.append(what)
            return missing

        monkeypatch.setattr(agreed_steps, "wait_for_all", wait)
        place = TrainPosition(1)
        counts = AgreedSteps(world, place, last=20)
        for _ in range(16):
            place.updates, place.taken = place.updates + 1, 1
            counts.after()
        assert waited == []
        place.updates, place.taken = place.updates + 4, 4
        if missing:
            with pytest.raises(StepError, match="rank 1 took 20 in 17 train steps, and rank 0 did not"):
                counts.after()
        else:
            counts.after()
        assert waited == ["20 optimizer steps"]
