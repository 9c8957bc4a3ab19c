"""A recipe that goes on for long, in small steps; it tells where each rank is by files."""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RANK = os.environ.get("RANK", "0")
SLOW = float(os.environ.get("SLOW", "0"))  # no parameter of the run, which a run that goes on must not change


def pause(seconds):
    """A test that has seen enough leaves the file `go`: from then on nothing is slow."""
    time.sleep(seconds if Path("go").exists() else seconds + SLOW)


def build_model(pause: float = 0.01, valid_pause: float = 0.0, setup: float = 0.0, imperative: bool = False):
    mark("setup")
    time.sleep(setup)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    model.pause, model.valid_pause, model.imperative = pause, valid_pause, imperative
    return model


def build_dataloaders(n_train: int = 48, n_valid: int = 6, batch_size: int = 2, workers: int = 0):
    x = torch.randn(n_train + n_valid, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.mean(dim=1, keepdim=True))
    train, valid = torch.utils.data.random_split(data, [n_train, n_valid], torch.Generator().manual_seed(1))
    how = {"num_workers": workers}
    return DataLoader(train, batch_size, shuffle=True, **how), DataLoader(valid, batch_size, **how)


def build_optimizer(model, lr: float = 0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def mark(where):
    Path(f"{where}-{RANK}").touch()


def train_step(model, x, y):
    mark("train")
    pause(model.pause)
    loss = (model(x) - y).square().mean()
    if model.imperative:
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        return loss.item()
    return loss


def valid_step(model, x, y):
    mark("valid")
    pause(model.valid_pause)
    return (model(x) - y).square().mean()
