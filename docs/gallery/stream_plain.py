"""A plain loop: the frequency of noisy signals, from an endless stream."""

from itertools import islice

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset


def signal(number):  # 128 noisy values of a wave, and its frequency
    generator = torch.Generator().manual_seed(number)
    frequency, phase = 1 + 4 * torch.rand(1, generator=generator), 6.28 * torch.rand(1, generator=generator)
    time = torch.arange(128, dtype=torch.float32) / 128
    noise = torch.randn(1, 128, generator=generator)
    return (6.28 * frequency * time + phase).sin()[None] + 0.5 * noise, frequency


class Signals(IterableDataset):
    def __iter__(self):
        number = 0
        while True:
            yield signal(number)
            number += 1


def network(width):
    layers = [nn.Conv1d(1, width, 9, 4), nn.ReLU(), nn.Conv1d(width, 2 * width, 9, 4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 1))


def main(epochs=8, epoch_steps=100, batch_size=32, lr=2e-3):
    torch.manual_seed(42)
    model = network(16)
    model(signal(0)[0][None])
    stream = iter(DataLoader(Signals(), batch_size))
    valid = DataLoader([signal(10**9 + number) for number in range(500)], 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        loss_sum = 0
        for x, y in islice(stream, epoch_steps):
            loss = mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
        with torch.no_grad():
            val_loss = sum(mse_loss(model(x), y).item() for x, y in valid) / len(valid)
        row = {"epoch": epoch, "loss": loss_sum / epoch_steps, "val_loss": val_loss}
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
