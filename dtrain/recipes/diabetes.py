"""How far diabetes has gone on after a year, from ten measurements of 442 patients: a table of numbers.

The table comes with scikit-learn. Every column is standardised with the mean and deviation of the training rows
alone, since those of all rows would let the validation rows, which stand for patients to come, into the training.
"""

from typing import Any

import torch
import torchmetrics
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def build_model(hidden: int = 32) -> nn.Module:
    """Ten standardised measurements (batch, 10) to the standardised progression (batch, 1)."""
    return nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def read_table() -> tuple[Tensor, Tensor]:
    """Measurements (rows, 10) and progression (rows, 1): read a table of your own here."""
    features, labels = load_diabetes(return_X_y=True, scaled=False)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32).unsqueeze(1)


def standardise(column: Tensor, train: list[int]) -> Tensor:
    """Mean 0 and deviation 1 over the training rows, column by column."""
    return (column - column[train].mean(dim=0)) / column[train].std(dim=0)


def build_dataloaders(batch_size: int = 16, valid_share: float = 0.25) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A fixed split of the rows: training and validation."""
    features, labels = read_table()
    train, valid = train_test_split(range(len(features)), test_size=valid_share, random_state=42)
    features, labels = standardise(features, train), standardise(labels, train)
    return (
        DataLoader(TensorDataset(features[train], labels[train]), batch_size, shuffle=True),
        DataLoader(TensorDataset(features[valid], labels[valid]), batch_size),
    )


def build_optimizer(model: nn.Module, lr: float = 0.003, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """AdamW over all weights; the decay keeps so few rows from being learnt by heart."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


def build_metrics() -> dict[str, torchmetrics.Metric]:
    """R2, the share of the variance that is explained: no mean over batches, so torchmetrics gathers what it needs."""
    return {"r2": torchmetrics.R2Score()}


def train_step(model: Any, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """The mean squared error of a batch, and what R2 is made of. The loss keeps its graph: dtrain does the rest."""
    predictions = model(features)
    return {"loss": nn.functional.mse_loss(predictions, labels), "r2": (predictions, labels)}


valid_step = train_step
