"""A plain loop: a small net learns from a large one."""

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


def make_teacher(steps):  # stands for a net that you have
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


def main(epochs=8, samples=1797, batch_size=32, lr=1e-2, steps=60, temperature=3.0):
    torch.manual_seed(42)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    teacher = make_teacher(steps)
    train, valid = read_digits(samples)
    train = DataLoader(train, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    valid = DataLoader(valid, 100)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        loss_sum = count = 0
        for x, y in train:
            out = student(x)
            with torch.no_grad():
                soft = (teacher(x) / temperature).softmax(1)
            hint = kl_div((out / temperature).log_softmax(1), soft, reduction="batchmean") * temperature**2
            loss = 0.1 * cross_entropy(out, y) + 0.9 * hint
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum, count = loss_sum + loss.item() * len(x), count + len(x)
        row = {"epoch": epoch, "loss": loss_sum / count}
        correct = taught = count = 0
        with torch.no_grad():
            for x, y in valid:
                correct += (student(x).argmax(1) == y).sum().item()
                taught += (teacher(x).argmax(1) == y).sum().item()
                count += len(x)
        row |= {"val_accuracy": correct / count, "val_teacher": taught / count}
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
