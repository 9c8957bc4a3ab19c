"""SimCLR on digits: each image against those of all ranks; a classifier on the embeddings as a metric."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize
from torch.utils.data import DataLoader, TensorDataset

import dtrain

valid_together = True  # valid_step gathers, too


def build_model():
    convolutions = [nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(nn.Sequential(*convolutions, nn.Linear(1024, 64)), nn.Sequential(nn.ReLU(), nn.Linear(64, 32)))


def build_dataloaders(samples: int = 1797, batch_size: int = 128):
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:samples, None] / 16, torch.tensor(digits.target)[:samples]
    cut = samples * 3 // 4
    train = DataLoader(x[:cut], batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return train, DataLoader(TensorDataset(x[cut:], y[cut:]), batch_size)


def build_optimizer(model, lr: float = 2e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def view(x):  # each image shifted, scaled and rotated at random
    angle, zoom = 0.4 * torch.rand(len(x)) - 0.2, 0.9 + 0.3 * torch.rand(len(x))
    shift = 0.5 * torch.rand(len(x), 2) - 0.25
    rows = [angle.cos() * zoom, -angle.sin() * zoom, shift[:, 0], angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]]
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3).to(x), list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False) + 0.05 * torch.randn(x.shape).to(x)


def nt_xent(a, b, temperature=0.2):  # the mean over this rank's images; the keys are those of all ranks
    (all_a, first), all_b = dtrain.gather(a, with_offset=True), dtrain.gather(b)
    own, n = torch.arange(len(a), device=a.device) + first, len(all_a)
    itself, other = torch.cat([own, own + n]), torch.cat([own + n, own])
    logits = torch.cat([a, b]) @ torch.cat([all_a, all_b]).T / temperature
    return cross_entropy(logits.scatter(1, itself[:, None], float("-inf")), other)


def train_step(model, x):
    a, b = normalize(model(torch.cat([view(x), view(x)]))).chunk(2)
    return nt_xent(a, b)


def valid_step(model, x, y):
    return {"loss": train_step(model, x), "nearest": (model[0](x), y)}


def nearest(z, y):  # how often the nearest other image has the same label
    return (y[torch.cdist(z, z).fill_diagonal_(float("inf")).argmin(1)] == y).double().mean().item()


def build_metrics():
    return {"nearest": nearest}


def predict_step(model, x):  # the embeddings
    return model[0](x)
