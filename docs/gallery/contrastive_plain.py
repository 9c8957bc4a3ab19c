"""A plain loop: SimCLR on digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize
from torch.utils.data import DataLoader, TensorDataset


def encoder():
    convolutions = [nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(nn.Sequential(*convolutions, nn.Linear(1024, 64)), nn.Sequential(nn.ReLU(), nn.Linear(64, 32)))


def view(x):  # each image shifted, scaled and rotated at random
    angle, zoom = 0.4 * torch.rand(len(x)) - 0.2, 0.9 + 0.3 * torch.rand(len(x))
    shift = 0.5 * torch.rand(len(x), 2) - 0.25
    rows = [angle.cos() * zoom, -angle.sin() * zoom, shift[:, 0], angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]]
    moved = grid_sample(
        x, affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False), align_corners=False
    )
    return moved + 0.05 * torch.randn(x.shape)


def nt_xent(a, b, temperature=0.2):
    n, keys = len(a), torch.cat([a, b])
    own = torch.arange(n)
    itself, other = torch.cat([own, own + n]), torch.cat([own + n, own])
    logits = (keys @ keys.T / temperature).scatter(1, itself[:, None], float("-inf"))
    return cross_entropy(logits, other)


def nearest(z, y):  # how often the nearest other image has the same label
    return (y[torch.cdist(z, z).fill_diagonal_(float("inf")).argmin(1)] == y).double().mean().item()


def main(epochs=10, samples=1797, batch_size=128, lr=2e-3):
    torch.manual_seed(42)
    model = encoder()
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:samples, None] / 16, torch.tensor(digits.target)[:samples]
    cut = samples * 3 // 4
    train = DataLoader(x[:cut], batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    valid = DataLoader(TensorDataset(x[cut:], y[cut:]), batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        loss_sum = count = 0
        for x in train:
            a, b = normalize(model(torch.cat([view(x), view(x)]))).chunk(2)
            loss = nt_xent(a, b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum, count = loss_sum + loss.item() * len(x), count + len(x)
        row = {"epoch": epoch, "loss": loss_sum / count}
        loss_sum = count = 0
        pairs = []
        with torch.no_grad():
            for x, y in valid:
                a, b = normalize(model(torch.cat([view(x), view(x)]))).chunk(2)
                loss_sum, count = loss_sum + nt_xent(a, b).item() * len(x), count + len(x)
                pairs.append((model[0](x), y))
        row["val_loss"] = loss_sum / count
        row["val_nearest"] = nearest(*map(torch.cat, zip(*pairs, strict=True)))
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
