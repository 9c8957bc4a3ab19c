"""A recipe with a fault at a place that parameters choose: rank, phase and step."""

import ctypes
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

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


def limit_memory(more=64 << 20):
    """Allows this process some bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)


def fill(make, more=64 << 20):
    """Takes memory until there is none, and keeps it."""
    limit_memory(more)
    kept = []
    while True:
        kept.append(make())


def note_time(path):
    """Tells whoever watches when it happened; whole or not at all."""
    if path:
        part = Path(f"{path}.{os.getpid()}")
        part.write_text(repr(time.time()))
        part.replace(path)


FAULTS = {
    "raise": lambda: 1 / 0,
    "shape": lambda: nn.Linear(2, 2)(torch.ones(3, 3)),
    "go on": lambda: None,
    "memory": lambda: bytearray(1 << 60),
    "memory of torch": lambda: fill(lambda: torch.ones(1 << 18)),
    "memory of objects": lambda: fill(lambda: [object() for _ in range(100)], more=8 << 20),
    "memory of text": lambda: fill(lambda: "x" * (1 << 20)),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "exit": lambda: os._exit(0),
    "segfault": lambda: ctypes.string_at(0),
    "sleep": fall_silent,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "work": lambda: work(4),
    "work 8 s": lambda: work(8),
    "write": lambda: write_slowly(4),
    "write 8 s": lambda: write_slowly(8),
}


class Rows(Dataset):
    """y = mean of x; sample `bad` is a fault of the worker that fetches it."""

    def __init__(self, length, fault, bad, mark=""):
        self.x = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
        self.fault, self.bad, self.mark = fault, bad, mark

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        # In a worker, and not as a run looks at some of its data before it begins.
        if index == self.bad and (self.fault == "nan" or get_worker_info() is not None):
            note_time(self.mark)
            if self.fault == "nan":
                x = x * torch.nan
            else:
                FAULTS[self.fault]()
        return x, self.x[index].mean(0, keepdim=True)


def build_model(fault="", rank=0, phase="train", step=1, epoch=1, imperative=False, mark=""):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    number = step + (epoch - 1) * (1 if phase == "checkpoint" else 4)
    model.plan, model.calls, model.imperative, model.mark = (fault, str(rank), phase, number), {}, imperative, mark
    # What writes the checkpoint asks for the state.
    model.register_state_dict_pre_hook(lambda *_: at("checkpoint", model))
    return model


def build_dataloaders(length=32, batch_size=4, workers=0, fault="", bad=-1, mark=""):
    train, valid = Rows(length, fault, bad, mark), Rows(length, "", -1)
    return DataLoader(train, batch_size, num_workers=workers), DataLoader(valid, batch_size)


def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def at(phase, model):
    fault, rank, where, step = model.plan
    model.calls[phase] = model.calls.get(phase, 0) + 1
    if fault and (RANK, phase, model.calls[phase]) == (rank, where, step):
        note_time(model.mark)
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
