"""A recipe with all that a resumed run must get right: shuffle, dropout, augmentation, BatchNorm, a weight average."""

import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

average = None  # of the weights: an object of the file's own, with a state
hidden_stream = random.Random(5)


class Noisy(Dataset):
    """Augments from all three random streams."""

    def __init__(self, n):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        return index, self.x[index] + 0.1 * noise, self.x[index].sum().reshape(1)


class Net(nn.Module):
    def __init__(self, hidden, dropout):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Dropout(dropout), nn.Tanh(), nn.Linear(hidden, 1)
        )
        self.register_buffer("order", torch.zeros((), dtype=torch.int64))  # of the samples that rank 0 saw

    def forward(self, x):
        return self.layers(x)


def build_model(hidden: int = 6, dropout: float = 0.2, pause: float = 0.0, fault: str = ""):
    global average  # noqa: PLW0603 - as notebooks do
    model = Net(hidden, dropout)
    model.pause, model.fault, model.counted = pause, fault, []
    hidden_stream.seed(5)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new)
    return model


class OwnStream(Noisy):
    """Augments from a random stream of its own, which nobody can know of."""

    stream = random.Random(5)

    def __getitem__(self, index):
        index, x, y = super().__getitem__(index)
        return index, x + self.stream.random(), y


class OwnOrder(Sampler):
    """Draws the order from a stream of its class, which is no attribute of its own."""

    stream = random.Random(5)

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter(self.stream.sample(range(len(self.data)), len(self.data)))


def build_dataloaders(n: int = 48, batch_size: int = 4, workers: int = 0, own: str = ""):
    data = OwnStream(n) if own == "stream" else Noisy(n)
    sampler = OwnOrder(data) if own == "order" else RandomSampler(data)
    return (
        DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=workers),
        DataLoader(Noisy(9), batch_size=batch_size),
    )


def build_optimizer(model, lr: float = 0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def build_scheduler(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100), "step"


def train_step(model, index, x, y):
    time.sleep(model.pause)
    for number in index.tolist():
        model.order.mul_(31).add_(number + 1)
    loss = (model(x) - y).square().mean()
    if model.fault == "stream":
        loss = loss * hidden_stream.random()
    if model.fault == "counter":
        model.counted.append(1)
        loss = loss * min(1.0, len(model.counted) / 40)
    average.update_parameters(model)
    return loss, loss.detach().sqrt()


def valid_step(model, index, x, y):
    loss = (model(x) - y).square().mean()
    return loss, loss.sqrt()
