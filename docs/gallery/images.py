"""Images with mixup over the whole global batch; the average of the weights (EMA) is a config key."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader, TensorDataset

import dtrain


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.a, self.b = nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(after), nn.BatchNorm2d(after)])
        self.short = nn.Conv2d(before, after, 1, 2)

    def forward(self, x):
        hidden = self.norms[0](self.a(x)).relu()
        return relu(self.norms[1](self.b(hidden)) + self.short(x))


def build_model(width: int = 16):
    stem = [nn.Conv2d(1, width, 3, 1, 1), nn.ReLU()]
    blocks = [Block(width, 2 * width), Block(2 * width, 4 * width)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def build_dataloaders(samples: int = 1797, batch_size: int = 32):
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    data, cut = TensorDataset(x[:samples], y[:samples]), samples * 3 // 4
    train = DataLoader(TensorDataset(*data[:cut]), batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return train, DataLoader(TensorDataset(*data[cut:]), 100)


def build_optimizer(model, lr: float = 3e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def mixup(x, y, alpha):  # the global batch is shuffled, so the next sample is a random one
    weight = torch.distributions.Beta(alpha, alpha).sample()
    (everyone, first), labels = dtrain.gather(x, with_offset=True), dtrain.gather(y)
    other = (torch.arange(len(x), device=x.device) + first + 1) % len(everyone)
    return weight * x + (1 - weight) * everyone[other], labels[other], weight


def train_step(model, x, y, alpha=0.2):
    mixed, other, weight = mixup(x, y, alpha)
    out = model(mixed)
    return weight * cross_entropy(out, y) + (1 - weight) * cross_entropy(out, other)


def valid_step(model, x, y):
    out = model(x)
    return {"loss": cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}
