"""What callbacks are for: unfreezing, growing images, pictures, a target, an object with state."""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import cohen_kappa_score, confusion_matrix
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset

import dtrain


class Digits(Dataset):
    def __init__(self, first, end, sizes=(8,)):
        digits = load_digits()
        self.x = torch.tensor(digits.images, dtype=torch.float32)[first:end, None] / 16
        self.y, self.sizes, self.epoch = torch.tensor(digits.target)[first:end], sizes, 0

    def set_epoch(self, epoch):  # called before each epoch, in workers, too
        self.epoch = epoch

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        size = self.sizes[min(self.epoch, len(self.sizes) - 1)]
        return interpolate(self.x[index, None], size=size)[0], self.y[index]


def build_model():
    convolutions = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()]
    body = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(512, 10)))


def build_dataloaders(samples: int = 1797, batch_size: int = 32):
    cut = samples * 3 // 4
    data, generator = Digits(0, cut, sizes=(6, 7, 8)), torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size, shuffle=True, generator=generator), DataLoader(Digits(cut, samples), 100)


def build_optimizer(model, lr: float = 3e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, x, y):
    return cross_entropy(model(x), y)


def valid_step(model, x, y):
    out = model(x)
    return {"loss": cross_entropy(out, y), "kappa": (y, out.argmax(1))}


def kappa(true, predicted):  # called once per epoch, on rank 0
    kappa.confusion = confusion_matrix(true, predicted)
    return cohen_kappa_score(true, predicted)


def build_metrics():
    return {"kappa": kappa}


def before_epoch(model, epoch):
    model.body.requires_grad_(epoch >= 3)


def after_epoch(model, run):
    run.histogram("head", model.head.weight)
    if run.is_main:
        run.image("confusion", kappa.confusion / 10)


class Best(dtrain.Callback):  # its state is in the checkpoints
    def __init__(self):
        self.kappa, self.epoch = -1.0, 0

    def after_epoch(self, row):
        if row["val_kappa"] > self.kappa:
            self.kappa, self.epoch = row["val_kappa"], row["epoch"]
        return {"bests": self.epoch}

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)


def build_callbacks():
    return [Best()]
