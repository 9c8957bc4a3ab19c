"""A recipe with repeated blocks, as a transformer has, in float64, so that any number of ranks gives the same."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Net(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.last = nn.Linear(width, 1)

    def encode(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.last(self.encode(x))


def build_model(width: int = 7, blocks: int = 2):
    return Net(width, blocks).double()


def build_dataloaders(n: int = 30, n_valid: int = 5, batch_size: int = 8):
    x = torch.randn(n + n_valid, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x.sum(1, keepdim=True)
    train, valid = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(valid, batch_size=2)


def build_optimizer(model, lr: float = 0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}


def valid_step(model, x, y):
    return {"loss": (model.last(model.encode(x)) - y).square().mean()}  # each rank has the whole net


def predict_step(model, x):
    return model.encode(x)
