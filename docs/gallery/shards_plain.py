"""A plain loop: digits from jsonl shards."""

import json
import random
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


def write_shards(folder, samples, number=10):  # of unequal sizes; yours are there already
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    for shard in range(number):
        ends = [samples * n**2 // number**2 for n in (shard, shard + 1)]
        lines = [json.dumps({"x": digits.data[i].tolist(), "y": int(digits.target[i])}) + "\n" for i in range(*ends)]
        folder.joinpath(f"{shard}.jsonl").write_text("".join(lines))


class Shards(IterableDataset):
    def __init__(self, paths, shuffle=False):
        self.paths, self.shuffle, self.epoch = paths, shuffle, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        chance, worker = random.Random(self.epoch), get_worker_info()
        paths = chance.sample(self.paths, len(self.paths)) if self.shuffle else self.paths
        for path in paths[worker.id :: worker.num_workers] if worker else paths:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in chance.sample(rows, len(rows)) if self.shuffle else rows:
                yield torch.tensor(row["x"]) / 16, row["y"]


def main(epochs=6, folder="data/shards", samples=1797, batch_size=32, workers=2, lr=5e-3):
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    write_shards(Path(folder), samples)
    paths = sorted(Path(folder).glob("*.jsonl"))
    stream = Shards(paths[:-2], shuffle=True)
    train = DataLoader(stream, batch_size, num_workers=workers)
    valid = DataLoader(Shards(paths[-2:]), 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        stream.set_epoch(epoch - 1)
        loss_sum = count = 0
        for x, y in train:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum, count = loss_sum + loss.item() * len(x), count + len(x)
        row = {"epoch": epoch, "loss": loss_sum / count}
        loss_sum = correct = count = 0
        with torch.no_grad():
            for x, y in valid:
                out = model(x)
                loss_sum += cross_entropy(out, y, reduction="sum").item()
                correct, count = correct + (out.argmax(1) == y).sum().item(), count + len(x)
        row |= {"val_loss": loss_sum / count, "val_accuracy": correct / count}
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
