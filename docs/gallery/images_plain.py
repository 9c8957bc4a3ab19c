"""A plain loop: images with mixup, and an average of the weights (EMA) that is validated."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.a, self.b = nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(after), nn.BatchNorm2d(after)])
        self.short = nn.Conv2d(before, after, 1, 2)

    def forward(self, x):
        hidden = self.norms[0](self.a(x)).relu()
        return relu(self.norms[1](self.b(hidden)) + self.short(x))


def resnet(width):
    stem = [nn.Conv2d(1, width, 3, 1, 1), nn.ReLU()]
    blocks = [Block(width, 2 * width), Block(2 * width, 4 * width)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def mixup(x, y, alpha):  # the batch is shuffled, so the next sample is a random one
    weight = torch.distributions.Beta(alpha, alpha).sample()
    return weight * x + (1 - weight) * x.roll(-1, 0), y.roll(-1, 0), weight


def main(epochs=8, samples=1797, batch_size=32, lr=3e-3, decay=0.98):
    torch.manual_seed(42)
    model = resnet(width=16)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    data, cut = TensorDataset(x[:samples], y[:samples]), samples * 3 // 4
    train = DataLoader(TensorDataset(*data[:cut]), batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    valid = DataLoader(TensorDataset(*data[cut:]), 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        loss_sum = count = 0
        for x, y in train:
            mixed, other, weight = mixup(x, y, 0.2)
            out = model(mixed)
            loss = weight * cross_entropy(out, y) + (1 - weight) * cross_entropy(out, other)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            loss_sum, count = loss_sum + loss.item() * len(x), count + len(x)
        row = {"epoch": epoch, "loss": loss_sum / count}
        average.eval()
        loss_sum = correct = count = 0
        with torch.no_grad():
            for x, y in valid:
                out = average(x)
                loss_sum += cross_entropy(out, y, reduction="sum").item()
                correct, count = correct + (out.argmax(1) == y).sum().item(), count + len(x)
        row |= {"val_loss": loss_sum / count, "val_accuracy": correct / count}
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
