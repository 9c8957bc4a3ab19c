"""Two tasks with one trunk, a batch of each in turn; each has its own columns, in training and in validation."""

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import dtrain

LOSSES = {"digits": cross_entropy, "diabetes": mse_loss}


def read(samples):  # of each task: data for training, for validation
    found = {}
    for task, bunch, scale in (("digits", load_digits(), 1 / 16), ("diabetes", load_diabetes(), 20)):
        x, y = torch.tensor(bunch.data, dtype=torch.float32)[:samples] * scale, torch.tensor(bunch.target)[:samples]
        y = y if task == "digits" else (y[:, None].to(x.dtype) - 150) / 80
        kept = torch.arange(len(x)) % 4 > 0
        found[task] = TensorDataset(x[kept], y[kept]), TensorDataset(x[~kept], y[~kept])
    return found


class MultiTask(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stems = nn.ModuleDict({"digits": nn.Linear(64, width), "diabetes": nn.Linear(10, width)})
        self.trunk = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleDict({"digits": nn.Linear(width, 10), "diabetes": nn.Linear(width, 1)})

    def forward(self, task, x):
        return self.heads[task](self.trunk(self.stems[task](x)))


class Alternating:  # a batch of each loader in turn, until the shortest ends
    def __init__(self, **loaders):
        self.loaders = loaders

    def __len__(self):
        return len(self.loaders) * min(map(len, self.loaders.values()))

    def __iter__(self):
        for batches in zip(*self.loaders.values()):
            for task, batch in zip(self.loaders, batches):
                yield task, *batch


def build_model(width: int = 64):
    return MultiTask(width)


def build_dataloaders(samples: int = 1797, digits: int = 64, diabetes: int = 16):
    data, sizes = read(samples), {"digits": digits, "diabetes": diabetes}
    generator = torch.Generator().manual_seed(0)
    train = {t: DataLoader(data[t][0], sizes[t], shuffle=True, generator=generator) for t in data}
    return Alternating(**train), {task: DataLoader(data[task][1], 100) for task in data}


def build_optimizer(model, lr: float = 3e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, task, x, y):
    loss = LOSSES[task](model(task, x), y)
    seen = {t: dtrain.Mean(loss.detach() * len(x) * (t == task), len(x) * (t == task)) for t in LOSSES}
    return {"loss": loss, **seen}


def valid_step(model, x, y, loader_name=""):
    out = model(loader_name, x)
    accuracy = {"accuracy": (out.argmax(1) == y).float().mean()} if loader_name == "digits" else {}
    return {"loss": LOSSES[loader_name](out, y), **accuracy}


def predict_step(model, x):  # dtrain predict --loader digits, the first
    return model("digits", x).argmax(1)
