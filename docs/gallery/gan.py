"""A DCGAN: two nets in one model, two optimizers, a metric of all samples, images for the trackers."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        first = [nn.Unflatten(1, (16, 1, 1)), nn.ConvTranspose2d(16, 64, 4), nn.BatchNorm2d(64), nn.ReLU()]
        self.G = nn.Sequential(*first, nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Tanh())
        self.D = nn.Sequential(nn.Conv2d(1, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4), nn.Flatten(0))


def build_model():
    return GAN()


def build_dataloaders(samples: int = 1797, batch_size: int = 64):
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:samples, None] / 8 - 1
    cut = samples * 3 // 4
    train = DataLoader(images[:cut], batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return train, DataLoader(images[cut:], 100)


def build_optimizer(model, lr: float = 2e-3):
    nets = {"g": model.G, "d": model.D}
    return {name: torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999)) for name, net in nets.items()}


def bce(logits, target):
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def train_step(model, real):
    fake, optimizer = model.G(torch.randn(len(real), 16, device=real.device)), model.optimizer
    optimizer["d"].zero_grad()
    loss_d = bce(model.D(real), 1.0) + bce(model.D(fake.detach()), 0.0)
    loss_d.backward()
    optimizer["d"].step()
    optimizer["g"].zero_grad()
    loss_g = bce(model.D(fake), 1.0)
    loss_g.backward()
    optimizer["g"].step()
    return {"d": loss_d, "g": loss_g}


def valid_step(model, real):
    return {"frechet": (real, model.G(torch.randn(len(real), 16, device=real.device)))}


def frechet(real, fake):  # the distance of FID, between pixels instead of features
    a, b = real.flatten(1).double(), fake.flatten(1).double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    return float((a.mean(0) - b.mean(0)).square().sum() + (a.var(0) + b.var(0)).sum() - 2 * roots.sum())


def build_metrics():
    return {"frechet": frechet}


def after_epoch(model, run):
    noise = torch.randn(25, 16, generator=torch.Generator().manual_seed(1)).to(run.device)
    run.image("samples", (model.G(noise) + 1).view(5, 5, 8, 8).transpose(1, 2).reshape(40, 40) / 2)


def predict_step(model, real):  # how real each image looks
    return model.D(real).sigmoid()
