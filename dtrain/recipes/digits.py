"""1,797 scanned handwritten digits and a small convolution net, in the function style.

The scans are scikit-learn's (the test set of the UCI "Optical Recognition of Handwritten Digits"), 8x8 pixels
of 17 grey levels, enlarged here to 28x28. They come with scikit-learn: nothing is downloaded.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitsNet(nn.Module):
    """The tutorial's net: images (batch, 1, 28, 28) to logits (batch, 10)."""

    def __init__(self, dropout: float) -> None:
        """Args: dropout: the share of feature maps that is left out in training."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5),
            nn.MaxPool2d(2),
            nn.Dropout2d(dropout),
            nn.AdaptiveMaxPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        self.loss_func = nn.CrossEntropyLoss()
        self.metric_func = accuracy
        self.metric_name = "accuracy"

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 28, 28) to logits (batch, 10)."""
        logits: Tensor = self.layers(images)
        return logits


def build_model(dropout: float = 0.1) -> nn.Module:
    """A fresh net, with its loss and metric on it."""
    return DigitsNet(dropout)


def build_dataloaders(
    batch_size: int = 16, valid_samples: int = 359, num_workers: int = 0
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A fixed stratified split: 1,438 scans to train on, and the first `valid_samples` of the other 359."""
    if not 1 <= valid_samples <= 359:
        raise ValueError(f"valid_samples = {valid_samples}: should be 1 to 359")
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # grey levels -1 to 1
    images = nn.functional.interpolate(images, size=(28, 28), mode="nearest")
    labels = torch.tensor(scans.target)
    train, valid = train_test_split(range(len(labels)), test_size=359, stratify=scans.target, random_state=0)
    valid = valid[:valid_samples]
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(TensorDataset(images[valid], labels[valid]), batch_size, num_workers=num_workers),
    )


def build_optimizer(model: nn.Module, lr: float = 0.004) -> torch.optim.Optimizer:
    """Adam over all weights."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def build_scheduler(optimizer: torch.optim.Optimizer, gamma: float = 0.6) -> torch.optim.lr_scheduler.LRScheduler:
    """Multiplies the learning rate by `gamma` after each epoch."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """The share of samples whose highest logit is the label's."""
    return (predictions.argmax(dim=1) == labels).float().mean()


def train_step(model: Any, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """One step of the tutorial's training loop."""
    model.train()
    model.optimizer.zero_grad()
    predictions = model(features)
    loss = model.loss_func(predictions, labels)
    metric = model.metric_func(predictions, labels)
    loss.backward()
    model.optimizer.step()
    return loss.item(), metric.item()


@torch.no_grad()
def valid_step(model: Any, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """One step of the tutorial's validation loop."""
    model.eval()
    predictions = model(features)
    loss = model.loss_func(predictions, labels)
    metric = model.metric_func(predictions, labels)
    return loss.item(), metric.item()
