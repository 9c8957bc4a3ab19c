"""Weights averaged equally from a share of the run on (SWA), compared with the mean of a plain loop's weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.model.ema import WeightAverage
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model():
    return nn.Linear(3, 1)

def build_dataloaders():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=20)

def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)

def train_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}

valid_step = train_step
"""
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True)
EPOCHS, FROM = 4, 0.55  # of 20 steps the last 9 are averaged: it begins within epoch 3


def by_hand(net: nn.Linear, epochs: int = EPOCHS, after: int = 11) -> tuple[list[float], list[float], list[float]]:
    """Validation losses, the averaged weights and the trained ones of a plain loop."""
    optimizer, taken, losses = torch.optim.SGD(net.parameters(), lr=0.1), [], []
    step = 0
    for _ in range(epochs):
        for rows in torch.arange(20).split(4):
            optimizer.zero_grad()
            (net(X[rows]) - Y[rows]).square().mean().backward()
            optimizer.step()
            step += 1
            if step > after:
                taken.append(torch.cat([p.detach().double().flatten() for p in net.parameters()]))
        now = torch.stack(taken).mean(0) if taken else torch.cat([p.detach().flatten() for p in net.parameters()])
        losses.append(float((X @ now[:3].float() + now[3].float() - Y[:, 0]).square().mean()))
    return (
        losses,
        torch.stack(taken).mean(0).tolist(),
        torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(),
    )


def start(folder: Path, *words: str, name: str = "it", world: World | None = None) -> Path:
    file = folder / "mine.py"
    if not file.exists():
        file.write_text(RECIPE)
    named = [f"run.dir={folder}", f"run.name={name}", f"train.swa_from={FROM}", "train.batch=global"]
    return train_run(load_settings(str(file), [*named, *words], environ={}), world or bring_up(cpu=True))


def on_ranks(world: World, folder: str) -> dict[str, Any]:
    start(Path(folder), f"epochs={EPOCHS}", name="ranks", world=world)
    torch.manual_seed(42)
    net = nn.Linear(3, 1)
    loaders = [DataLoader(TensorDataset(X, Y), batch_size=size) for size in (4, 20)]

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
        return {"loss": (model(x) - y).square().mean()}

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    frame = dtrain.train_model(
        net,
        EPOCHS,
        *loaders,
        train_step=step,
        valid_step=step,
        optimizer=optimizer,
        swa_from=FROM,
        batch="global",
        verbose=False,
        world=world,
    )
    return {
        "losses": frame["val_loss"].tolist(),
        "weights": torch.cat([p.flatten() for p in net.parameters()]).tolist(),
    }


def test_it_is_the_mean_of_the_last_steps_weights_on_1_and_2_ranks_and_over_resumes(tmp_path: Path) -> None:
    torch.manual_seed(42)
    losses, averaged, trained = by_hand(nn.Linear(3, 1))
    run = start(tmp_path, f"epochs={EPOCHS}", name="whole")
    assert dtrain.read_history(run)["val_loss"].tolist() == pytest.approx(losses, rel=1e-5)
    saved = dtrain.load(run, "last").state_dict()
    weights = torch.cat([saved["weight"].flatten(), saved["bias"]])
    assert weights.tolist() == pytest.approx(averaged, rel=1e-5) and averaged != pytest.approx(trained, rel=1e-3)
    for found in run_ranks(on_ranks, 2, folder=str(tmp_path)):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert found["weights"] == pytest.approx(averaged, rel=1e-5), "the net has the average in the end"
    frame = dtrain.read_history(run)[["epoch", "loss", "val_loss"]]
    assert dtrain.read_history(tmp_path / "ranks")["val_loss"].tolist() == pytest.approx(losses, rel=1e-5)
    # Resumed before it begins, and while it averages: to the last bit.
    for cut in ("epoch-1", "epoch-3-step-3"):
        again = start(tmp_path, f"epochs={EPOCHS}", "checkpoint.every_steps=1", "checkpoint.keep_last=99", name=cut)
        for path in sorted((again / "checkpoints").iterdir()):
            if path.name not in ("epoch-1", cut):
                path.rename(again / path.name)
        start(tmp_path, f"epochs={EPOCHS}", name=cut)
        assert dtrain.read_history(again)[["epoch", "loss", "val_loss"]].equals(frame)
        assert all(torch.equal(value, saved[name]) for name, value in dtrain.load(again, "last").state_dict().items())


def test_a_longer_run_begins_its_average_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, "epochs=3")  # 15 steps: averages after 9, and would have 6 of them
    run = start(tmp_path, "epochs=6")  # 30 steps: after 17
    assert "train.epochs was 3 and is 6: train.swa_from = 0.55 is another step now" in caplog.text
    torch.manual_seed(42)
    losses, averaged, _ = by_hand(nn.Linear(3, 1), 6, 17)
    saved = dtrain.load(run, "last").state_dict()
    assert torch.cat([saved["weight"].flatten(), saved["bias"]]).tolist() == pytest.approx(averaged, rel=1e-5)
    assert dtrain.read_history(run)["val_loss"].tolist()[3:] == pytest.approx(losses[3:], rel=1e-5)


def test_it_is_exact_in_float32_of_weights_in_bfloat16() -> None:
    net = nn.Linear(1, 1, bias=False).bfloat16()
    average = WeightAverage(net, None, after=2)
    values = [1.0, 1.0, *(1 + k / 128 for k in range(100))]
    for value in values:
        with torch.no_grad():
            net.weight.fill_(value)
        average.update()
    mean = sum(float(torch.tensor(value).bfloat16()) for value in values[2:]) / 100
    assert float(average.exact()["weight"]) == pytest.approx(mean, rel=1e-6)


def test_what_cannot_be_is_refused_and_batchnorm_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(dtrain.ConfigError, match="ema_decay and swa_from both average the weights"):
        start(tmp_path, "train.ema_decay=0.9")
    stream = RECIPE.replace("DataLoader(data, batch_size=4)", "[(a, b) for a, b in DataLoader(data, 4)].__iter__()")
    (tmp_path / "mine.py").write_text(stream)
    with pytest.raises(dtrain.UsageError, match=r"has no length\. Set train\.max_steps too, or use ema_decay"):
        start(tmp_path, "epochs=1")
    assert not (tmp_path / "it").exists()
    start(tmp_path, "epochs=1", "train.max_steps=4")
    (tmp_path / "mine.py").write_text(
        RECIPE.replace("nn.Linear(3, 1)", "nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))")
    )
    with caplog.at_level(logging.WARNING):
        start(tmp_path, "epochs=1", name="norm")
    assert "swa_from: BatchNorm keeps the running statistics of the trained weights" in caplog.text
