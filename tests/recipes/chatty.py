"""A recipe that prints in all the ways there are while it trains: steps, workers, warnings, C, somebody else's bar."""

import os
import sys
import time
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

RANK = os.environ.get("RANK", "0")
STEPS = 8
done = []


class Rows(Dataset):
    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 4 * STEPS * int(os.environ.get("WORLD_SIZE", "1"))

    def __getitem__(self, index):
        if self.split == "train" and index == 6 and get_worker_info() is not None:  # and not as a run looks at its data
            print(f"a worker says\ntwo lines of rank {RANK}")
        return torch.full((3,), index / 10), torch.ones(1)


class Endless:
    """A loader that cannot tell how long it is."""

    def __iter__(self):
        return iter(DataLoader(Rows("other"), 4))


def build_model():
    return nn.Linear(3, 1)


def build_dataloaders(workers: int = 1, endless: bool = False):
    train = Endless() if endless else DataLoader(Rows("train"), 4, num_workers=workers)
    return train, DataLoader(Rows("valid"), 16)


def build_optimizer(model, lr: float = 1e-3):
    return torch.optim.SGD(model.parameters(), lr=lr)


def bar():
    for percent in (10, 50, 100):
        print(f"\r{percent}% of something else", end="", file=sys.stderr, flush=True)
        time.sleep(0.02)
    print(file=sys.stderr)


def train_step(model, x, y):
    done.append(x)
    count = len(done)
    time.sleep(0.12)  # longer than what lies between two drawings
    if count == 2:
        print(f"rank {RANK} prints in a step")
    if count == 3:
        warnings.warn(f"rank {RANK} warns", UserWarning, stacklevel=1)
    if count == 4:
        os.write(2, f"C writes on rank {RANK}\n".encode())
    if count == 5 and RANK == "0":
        bar()
    if count == 6:
        print(f"the first half and, on rank {RANK}, ", end="")
        time.sleep(0.12)
        print("the second")
    loss = (model(x) - y).square().mean()
    return {"loss": loss, "accuracy": 0.5, "f1_macro_averaged": 0.25}


def valid_step(model, x, y):
    time.sleep(0.12)
    return {"loss": (model(x) - y).square().mean(), "accuracy": 0.5, "f1_macro_averaged": 0.25}
