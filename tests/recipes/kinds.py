"""A recipe whose batches are no stacked tensors, but come ready from a stream."""

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Ready(IterableDataset):
    """Batches of 4: images in a list with a target for each, or a sequence whose first dimension is time."""

    def __init__(self, kind):
        self.kind = kind

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for count in (4, 4, 4, 4, 4, 2):
            if self.kind == "time":
                yield torch.randn(7, count, 3, generator=generator), torch.randn(count, generator=generator)
            else:
                images = [torch.randn(3, 4 + i % 3, 5, generator=generator) for i in range(count)]
                yield images, [{"value": torch.randn(1, generator=generator)} for _ in images]


def batch_size(batch):
    return len(batch[1])


def split_batch(batch, sizes):
    if isinstance(batch[1], list):
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        return [tuple(part[at : at + size] for part in batch) for at, size in zip(starts, sizes, strict=True)]
    return list(zip(batch[0].split(sizes, 1), batch[1].split(sizes), strict=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, means):
        return self.layer(means)[:, 0]


def build_model():
    return Net()


def build_dataloaders(kind: str = "detector"):
    return DataLoader(Ready(kind), batch_size=None), DataLoader(Ready(kind), batch_size=None)


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train_step(model, features, targets):
    if isinstance(targets, list):
        means = torch.stack([image.mean((1, 2)) for image in features])
        targets = torch.cat([target["value"] for target in targets])
    else:
        means = features.mean(0)
    return (model(means) - targets).square().mean()


valid_step = train_step
