"""A plain loop: a DCGAN with two optimizers."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader


def generator():
    first = [nn.Unflatten(1, (16, 1, 1)), nn.ConvTranspose2d(16, 64, 4), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*first, nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Tanh())


def discriminator():
    return nn.Sequential(nn.Conv2d(1, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4), nn.Flatten(0))


def bce(logits, target):
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def frechet(real, fake):  # the distance of FID, between pixels instead of features
    a, b = real.flatten(1).double(), fake.flatten(1).double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    return float((a.mean(0) - b.mean(0)).square().sum() + (a.var(0) + b.var(0)).sum() - 2 * roots.sum())


def main(epochs=20, samples=1797, batch_size=64, lr=2e-3):
    torch.manual_seed(42)
    G, D = generator(), discriminator()
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:samples, None] / 8 - 1
    cut = samples * 3 // 4
    train = DataLoader(images[:cut], batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    valid = DataLoader(images[cut:], 100)
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999)) for net in (G, D))
    history = []
    for epoch in range(1, epochs + 1):
        G.train(), D.train()
        sum_d = sum_g = count = 0
        for real in train:
            fake = G(torch.randn(len(real), 16))
            opt_d.zero_grad()
            loss_d = bce(D(real), 1.0) + bce(D(fake.detach()), 0.0)
            loss_d.backward()
            opt_d.step()
            opt_g.zero_grad()
            loss_g = bce(D(fake), 1.0)
            loss_g.backward()
            opt_g.step()
            sum_d, sum_g = sum_d + loss_d.item() * len(real), sum_g + loss_g.item() * len(real)
            count += len(real)
        row = {"epoch": epoch, "d": sum_d / count, "g": sum_g / count}
        G.eval()
        with torch.no_grad():
            pairs = [(real, G(torch.randn(len(real), 16))) for real in valid]
        row["val_frechet"] = frechet(*map(torch.cat, zip(*pairs, strict=True)))
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
