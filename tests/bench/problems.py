"""What is trained: nine known values for the numbers, scikit-learn's digits for the speed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset


class CountingNet(nn.Module):
    """Returns its input, as predictions; counts the rows that it sees in eval mode. Has one weight, of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            self.seen += len(values)
        return values * self.weight


class Nine:
    """Nine samples of the values 0 to 8 (their mean is 4); a batch's loss and metric are the mean of its values.

    For trainers that want labels these are ones, and do nothing to any mean.
    """

    truth = 4.0

    def __init__(self) -> None:
        self.dataset = TensorDataset(torch.arange(9.0), torch.ones(9))
        self.net = CountingNet()

    def loader(self, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=2, sampler=sampler)

    def optimizer(self) -> torch.optim.Optimizer:
        """Keeps the weight as it is."""
        return torch.optim.SGD(self.net.parameters(), lr=0.0)

    @staticmethod
    def loss(predictions: Tensor, labels: Tensor) -> Tensor:
        return predictions.mean()


class MeanLoss(nn.Module):
    """`Nine.loss` for trainers that want a module."""

    def forward(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return Nine.loss(predictions, labels)


@dataclass
class Problem:
    """A net and its data; every process makes the same.

    Attributes:
        model: its name, "mlp", "cnn" or "tutorial".
        batch_size: of each rank.
    """

    model: str
    batch_size: int
    train_set: TensorDataset
    valid_set: TensorDataset

    def __post_init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.loss_func = nn.CrossEntropyLoss()

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "cnn":
            from dtrain.recipes.digits import DigitsNet

            return DigitsNet(dropout=0.1)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        if self.model == "cnn":
            return torch.optim.Adam(net.parameters(), lr=0.001)
        return torch.optim.SGD(net.parameters(), lr=0.1)

    def train_loader(self, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(self.train_set, self.batch_size, shuffle=sampler is None, sampler=sampler)

    def valid_loader(self, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(self.valid_set, self.batch_size, sampler=sampler)

    def own_valid_loader(self) -> DataLoader[Any]:
        """This rank's part of the validation samples, none twice."""
        rows = range(self.rank, len(self.valid_set), self.size)
        return DataLoader(Subset(self.valid_set, rows), self.batch_size)

    @staticmethod
    def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
        """A batch's."""
        return (predictions.argmax(dim=1) == labels).float().mean()


def digits(model: str) -> Problem:
    """The digits, 80 % of them to train on, by a fixed permutation; for the CNN as its recipe has them."""
    if model == "cnn":
        from dtrain.recipes.digits import build_dataloaders

        train, valid = (loader.dataset for loader in build_dataloaders())
        return Problem(model, 16, train, valid)
    from sklearn.datasets import load_digits

    scans = load_digits()
    features, labels = torch.tensor(scans.data, dtype=torch.float32) / 16, torch.tensor(scans.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, valid = order[: len(order) * 8 // 10], order[len(order) * 8 // 10 :]
    return Problem(
        model, 32, TensorDataset(features[train], labels[train]), TensorDataset(features[valid], labels[valid])
    )
