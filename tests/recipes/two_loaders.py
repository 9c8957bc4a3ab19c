"""Two training loaders, a batch of each in a step."""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset


def data(samples, seed):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True) + seed)


def build_model():
    return nn.Linear(3, 1)


def build_dataloaders():
    few, many = DataLoader(data(23, 1), 6, shuffle=True), DataLoader(data(37, 2), 12, shuffle=True)
    return {"few": few, "many": many}, DataLoader(data(7, 3), 4)


def build_optimizer(model, lr: float = 0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train_step(model, batch):
    (x, y), (u, v) = batch["few"], batch["many"]
    return mse_loss(model(x), y) + 0.5 * mse_loss(model(u), v)


def valid_step(model, x, y):
    return mse_loss(model(x), y)
