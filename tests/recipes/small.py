"""A recipe whose data and faults are set by parameters: y = mean of x, plus what a test asks for."""

import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Faulty(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise OSError("the disk with sample 5 is gone")
        return torch.ones(3), torch.ones(1)


def build_model(width: int = 3, fault: str = ""):
    if fault == "build":
        raise RuntimeError("no such layer")
    model = nn.Linear(width, 1)
    model.fault = fault
    return model


def build_dataloaders(
    n_train: int = 12, n_valid: int = 5, batch_size: int = 4, drop_last: bool = False, kind: str = ""
):
    if kind == "faulty":
        data = DataLoader(Faulty(), batch_size=batch_size, num_workers=1)
        return data, data
    torch.manual_seed(0)
    x = torch.randn(n_train + n_valid, 3)
    train = TensorDataset(x[:n_train], x[:n_train].mean(dim=1, keepdim=True))
    valid = TensorDataset(x[n_train:], x[n_train:].mean(dim=1, keepdim=True))
    return (
        DataLoader(train, batch_size=batch_size, drop_last=drop_last),
        None if kind == "no-valid" else DataLoader(valid, batch_size=batch_size),
    )


def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def on_this_rank(fault):
    """ "raise" happens on every rank, "raise@1" on rank 1 alone."""
    name, _, rank = fault.partition("@")
    return name if rank in ("", os.environ.get("RANK", "0")) else ""


def train_step(model, features, labels):
    loss = ((model(features) - labels) ** 2).mean()
    fault = on_this_rank(model.fault)
    if fault == "raise":
        raise ValueError("a fault of the user's own")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(0)
    if fault == "sys-exit":
        sys.exit(3)
    if fault == "hang":
        signal.pause()
    results = {
        "nothing": None,
        "three": (loss, loss, loss),
        "text": (loss, "good"),
        "two-elements": (loss, torch.ones(2)),
        "no-graph": loss.item(),
        "empty": {},
    }
    if fault in results:
        return results[fault]
    if fault == "backward-only":
        loss.backward()
        return loss.item()
    return loss, loss.detach().sqrt()


def valid_step(model, features, labels):
    if on_this_rank(model.fault) == "raise-in-valid":
        raise ValueError("a fault in validation")
    loss = ((model(features) - labels) ** 2).mean()
    return loss, loss.sqrt()
