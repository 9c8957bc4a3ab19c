"""A recipe: a net, its data and two steps, as functions. `dtrain train` calls them; replace them by your own.

The parameters of the three builders are keys of train.yaml: `hidden` here is `model.hidden` there, or `hidden=128` on
the command line. A recipe imports nothing of dtrain.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


def build_model(hidden: int = 64) -> nn.Module:
    """The net: images (batch, 64) to logits (batch, 10)."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def build_dataloaders(batch_size: int = 32) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The data: 1,797 scanned digits of 8x8 pixels that come with scikit-learn.

    On several ranks dtrain deals the samples to them: these loaders stay as for one process.
    """
    scans = load_digits()
    data = TensorDataset(torch.tensor(scans.data, dtype=torch.float32) / 16, torch.tensor(scans.target))
    # A generator of its own: the same split each time, whatever the run's seed is.
    train, valid = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(valid, batch_size)


def build_optimizer(model: nn.Module, lr: float = 0.005) -> torch.optim.Optimizer:
    """What learns. A `build_scheduler(optimizer, ...)` may follow; or `schedule` in train.yaml, as here."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def train_step(model: Any, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """One batch. Each value is a mean over its samples; the history has the mean over all samples of all ranks.

    The loss keeps its graph, and dtrain runs backward(), the optimizer's step and zero_grad(). A step that does
    all three itself and returns (loss.item(), metric.item()), as in the tutorials, works as well.
    """
    logits = model(features)
    loss = nn.functional.cross_entropy(logits, labels)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return {"loss": loss, "accuracy": accuracy}


# The same for validation, where dtrain has called model.eval() and computes no gradients.
valid_step = train_step
