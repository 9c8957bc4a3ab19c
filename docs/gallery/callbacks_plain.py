"""A plain loop with what callbacks are for: unfreezing, growing images, pictures, a target, the best epoch."""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import cohen_kappa_score, confusion_matrix
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter


class Digits(Dataset):
    def __init__(self, first, end, sizes=(8,)):
        digits = load_digits()
        self.x = torch.tensor(digits.images, dtype=torch.float32)[first:end, None] / 16
        self.y, self.sizes, self.epoch = torch.tensor(digits.target)[first:end], sizes, 0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        size = self.sizes[min(self.epoch, len(self.sizes) - 1)]
        return interpolate(self.x[index, None], size=size)[0], self.y[index]


def network():
    convolutions = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()]
    body = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(512, 10)))


def main(epochs=10, samples=1797, batch_size=32, lr=3e-3, target=0.95, folder="board"):
    torch.manual_seed(42)
    model = network()
    cut = samples * 3 // 4
    data = Digits(0, cut, sizes=(6, 7, 8))
    train = DataLoader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    valid = DataLoader(Digits(cut, samples), 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    board, best, history = SummaryWriter(folder), -1.0, []
    for epoch in range(1, epochs + 1):
        model.body.requires_grad_(epoch >= 3)
        data.epoch = epoch - 1
        loss_sum = count = 0
        for x, y in train:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum, count = loss_sum + loss.item() * len(x), count + len(x)
        row = {"epoch": epoch, "loss": loss_sum / count}
        pairs, loss_sum, count = [], 0, 0
        with torch.no_grad():
            for x, y in valid:
                out = model(x)
                loss_sum, count = loss_sum + cross_entropy(out, y, reduction="sum").item(), count + len(x)
                pairs.append((y, out.argmax(1)))
        true, predicted = map(torch.cat, zip(*pairs))
        row |= {"val_loss": loss_sum / count, "val_kappa": cohen_kappa_score(true, predicted)}
        board.add_image("confusion", confusion_matrix(true, predicted)[None] / 10, epoch)
        board.add_histogram("head", model.head.weight, epoch)
        if row["val_kappa"] > best:
            best, best_epoch = row["val_kappa"], epoch
            torch.save(model.state_dict(), f"{folder}/best.pt")
        row["bests"] = best_epoch
        history.append(row)
        print(row)
        if row["val_kappa"] >= target:
            break
    board.close()
    return history


if __name__ == "__main__":
    main()
