"""The bundled digits in float64: what is left of a difference from NumPy is then no rounding of the net's."""

from torch.utils.data import DataLoader, TensorDataset

from dtrain.recipes import digits
from dtrain.recipes.digits import build_optimizer, build_scheduler, train_step, valid_step

__all__ = ["build_dataloaders", "build_model", "build_optimizer", "build_scheduler", "train_step", "valid_step"]


def build_model(dropout: float = 0.1):
    return digits.build_model(dropout).double()


def build_dataloaders(batch_size: int = 16, valid_samples: int = 359):
    (train, valid) = (loader.dataset.tensors for loader in digits.build_dataloaders(batch_size, valid_samples))
    return (
        DataLoader(TensorDataset(train[0].double(), train[1]), batch_size, shuffle=True),
        DataLoader(TensorDataset(valid[0].double(), valid[1]), batch_size),
    )
