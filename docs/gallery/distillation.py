"""A small net learns from a large one, which stays frozen, in eval mode, and out of the checkpoints."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader, TensorDataset


def read_digits(samples):
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:samples, None] / 16, torch.tensor(digits.target)[:samples]
    cut = samples * 3 // 4
    return TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])


def make_teacher(steps):  # stands for a net that you have: dtrain.load("runs/teacher")
    layers = [
        nn.Conv2d(1, 32, 3, 1, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
    ]
    teacher = nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(576, 10))
    (x, y), optimizer = read_digits(1797)[0].tensors, torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        cross_entropy(teacher(x[step % 8 :: 8]), y[step % 8 :: 8]).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


class Student(nn.Module):
    def __init__(self, width, steps):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.teacher = make_teacher(steps)

    def forward(self, x):
        return self.layers(x)


def build_model(width: int = 16, steps: int = 60):
    return Student(width, steps)


def build_dataloaders(samples: int = 1797, batch_size: int = 32):
    train, valid = read_digits(samples)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(train, batch_size, shuffle=True, generator=generator), DataLoader(valid, 100)


def build_optimizer(model, lr: float = 1e-2):
    return torch.optim.AdamW(model.layers.parameters(), lr=lr)


def train_step(model, x, y, temperature=3.0):
    out, soft = model(x), (model.teacher(x) / temperature).softmax(1)
    hint = kl_div((out / temperature).log_softmax(1), soft, reduction="batchmean") * temperature**2
    return 0.1 * cross_entropy(out, y) + 0.9 * hint


def valid_step(model, x, y):
    nets = {"accuracy": model, "teacher": model.teacher}
    return {name: (net(x).argmax(1) == y).float().mean() for name, net in nets.items()}
