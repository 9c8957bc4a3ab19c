"""An endless stream that each rank reads its part of; an epoch is `train.epoch_steps` optimizer steps."""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset


def signal(number):  # 128 noisy values of a wave, and its frequency
    generator = torch.Generator().manual_seed(number)
    frequency, phase = 1 + 4 * torch.rand(1, generator=generator), 6.28 * torch.rand(1, generator=generator)
    time = torch.arange(128, dtype=torch.float32) / 128
    noise = torch.randn(1, 128, generator=generator)
    return (6.28 * frequency * time + phase).sin()[None] + 0.5 * noise, frequency


class Signals(IterableDataset):
    def __init__(self):
        self.count, self.rank, self.world_size = 0, 0, 1

    def set_rank(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def state_dict(self):  # with these two, a resumed run skips what was read
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def __iter__(self):
        while True:
            self.count += 1
            yield signal((self.count - 1) * self.world_size + self.rank)


def build_model(width: int = 16):
    layers = [nn.Conv1d(1, width, 9, 4), nn.ReLU(), nn.Conv1d(width, 2 * width, 9, 4), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 1))
    model(signal(0)[0][None])
    return model


def build_dataloaders(batch_size: int = 32):
    return DataLoader(Signals(), batch_size), DataLoader([signal(10**9 + number) for number in range(500)], 100)


def build_optimizer(model, lr: float = 2e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, x, y):
    return mse_loss(model(x), y)


valid_step = train_step
