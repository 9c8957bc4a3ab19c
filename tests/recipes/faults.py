"""A recipe with a fault at a place that parameters choose: rank, phase and step."""

import ctypes
import os
import signal
import tempfile
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

RANK = os.environ.get("RANK", "0")


def fall_silent():
    while True:
        time.sleep(3600)


def write_slowly(seconds):
    with tempfile.TemporaryFile() as file:
        for _ in range(int(seconds * 10)):
            file.write(bytes(65536))
            file.flush()
            time.sleep(0.1)


def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


FAULTS = {
    "raise": lambda: 1 / 0,
    "shape": lambda: nn.Linear(2, 2)(torch.ones(3, 3)),
    "memory": lambda: bytearray(1 << 60),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "exit": lambda: os._exit(0),
    "segfault": lambda: ctypes.string_at(0),
    "sleep": fall_silent,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "work": lambda: work(4),
    "write": lambda: write_slowly(4),
}


class Rows(Dataset):
    """y = mean of x; sample `bad` is a fault of the worker that fetches it."""

    def __init__(self, length, fault, bad):
        self.x = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
        self.fault, self.bad = fault, bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        if index == self.bad:
            if self.fault == "nan":
                x = x * torch.nan
            else:
                FAULTS[self.fault]()
        return x, self.x[index].mean(0, keepdim=True)


def build_model(fault="", rank=0, phase="train", step=1, epoch=1, imperative=False):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.plan, model.calls, model.imperative = (
        (fault, str(rank), phase, step + (epoch - 1) * (1 if phase == "checkpoint" else 4)),
        {},
        imperative,
    )
    # What writes the checkpoint asks for the state.
    model.register_state_dict_pre_hook(lambda *_: at("checkpoint", model))
    return model


def build_dataloaders(length=32, batch_size=4, workers=0, fault="", bad=-1):
    train, valid = Rows(length, fault, bad), Rows(length, "", -1)
    return DataLoader(train, batch_size, num_workers=workers), DataLoader(valid, batch_size)


def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def at(phase, model):
    fault, rank, where, step = model.plan
    model.calls[phase] = model.calls.get(phase, 0) + 1
    if fault and (RANK, phase, model.calls[phase]) == (rank, where, step):
        return float("nan") if fault == "nan" else FAULTS[fault]() or 1.0
    return 1.0


def train_step(model, x, y):
    factor = at("train", model)
    loss = (model(x) - y).square().mean() * factor
    if model.imperative:
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        return loss.item()
    return loss


def valid_step(model, x, y):
    at("valid", model)
    return (model(x) - y).square().mean()
