"""A recipe that can be made to depend on how a batch is split, in one way at a time."""

import os

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Noisy(Dataset):
    """Augments each sample from the global random stream."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(3), self.y[index]


def build_model(fault: str = ""):
    if fault == "seed":
        torch.manual_seed(int(os.environ.get("RANK", "0")))
    norm = {"batch-norm": nn.BatchNorm1d(4), "dropout": nn.Dropout(0.5)}.get(fault, nn.Identity())
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1))
    model.fault = fault
    return model


def build_dataloaders(noisy: bool = False):
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1, keepdim=True)
    data = Noisy(x, y) if noisy else TensorDataset(x, y)
    return DataLoader(data, batch_size=8, shuffle=True), DataLoader(TensorDataset(x, y), batch_size=8)


class OfTheRank(torch.optim.SGD):
    """Steps further on other ranks than the first."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.05 * (1 + int(os.environ.get("RANK", "0")))
        return super().step(closure)


def build_optimizer(model):
    return (OfTheRank if model.fault == "optimizer" else torch.optim.SGD)(model.parameters(), lr=0.05)


def train_step(model, x, y):
    errors = model(x) - y
    loss = (errors**2).sum() if model.fault == "summed" else (errors**2).mean()
    if model.fault == "gradient":
        loss = loss.detach() + (loss - loss.detach()) * (1 + y.square().mean())
    metric = errors.detach().abs().max() if model.fault == "metric" else errors.detach().abs().mean()
    return loss, metric


def valid_step(model, x, y):
    errors = model(x) - y
    return (errors**2).mean(), errors.abs().mean()
