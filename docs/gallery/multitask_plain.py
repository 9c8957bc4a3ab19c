"""A plain loop: two tasks with one trunk, a batch of each in turn."""

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

LOSSES = {"digits": cross_entropy, "diabetes": mse_loss}


def read(samples):  # of each task: data for training, for validation
    found = {}
    for task, bunch, scale in (("digits", load_digits(), 1 / 16), ("diabetes", load_diabetes(), 20)):
        x, y = torch.tensor(bunch.data, dtype=torch.float32)[:samples] * scale, torch.tensor(bunch.target)[:samples]
        y = y if task == "digits" else (y[:, None].to(x.dtype) - 150) / 80
        kept = torch.arange(len(x)) % 4 > 0
        found[task] = TensorDataset(x[kept], y[kept]), TensorDataset(x[~kept], y[~kept])
    return found


class MultiTask(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stems = nn.ModuleDict({"digits": nn.Linear(64, width), "diabetes": nn.Linear(10, width)})
        self.trunk = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleDict({"digits": nn.Linear(width, 10), "diabetes": nn.Linear(width, 1)})

    def forward(self, task, x):
        return self.heads[task](self.trunk(self.stems[task](x)))


class Alternating:  # a batch of each loader in turn, until the shortest ends
    def __init__(self, **loaders):
        self.loaders = loaders

    def __len__(self):
        return len(self.loaders) * min(map(len, self.loaders.values()))

    def __iter__(self):
        for batches in zip(*self.loaders.values()):
            for task, batch in zip(self.loaders, batches):
                yield task, *batch


def main(epochs=10, samples=1797, lr=3e-3):
    torch.manual_seed(42)
    model = MultiTask(width=64)
    data, sizes = read(samples), {"digits": 64, "diabetes": 16}
    generator = torch.Generator().manual_seed(0)
    train = {t: DataLoader(data[t][0], sizes[t], shuffle=True, generator=generator) for t in data}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        sums, counts = dict.fromkeys(data, 0.0), dict.fromkeys(data, 0)
        for task, x, y in Alternating(**train):
            loss = LOSSES[task](model(task, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums[task], counts[task] = sums[task] + loss.item() * len(x), counts[task] + len(x)
        row = {"epoch": epoch} | {task: sums[task] / counts[task] for task in data}
        with torch.no_grad():
            for task, (_, valid) in data.items():
                x, y = valid.tensors
                row[f"val_{task}_loss"] = LOSSES[task](model(task, x), y).item()
            x, y = data["digits"][1].tensors
            row["val_digits_accuracy"] = (model("digits", x).argmax(1) == y).float().mean().item()
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
