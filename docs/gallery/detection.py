"""Boxes in images of unequal sizes: batches are lists, the metric is of the whole set, predictions are lists."""

import torch
from detection_data import average_precision, drawings
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, max_pool2d
from torch.utils.data import DataLoader


def collate(items):  # lists, since no two images have one size
    images, boxes = zip(*items, strict=True)
    return list(images), list(boxes)


class Detector(nn.Module):  # one score and one box for each 4 x 4 pixels
    def __init__(self, width):
        super().__init__()
        layers = [nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(2 * width, 2 * width, 5, 1, 2), nn.ReLU(), nn.Conv2d(2 * width, 5, 1)
        )

    def forward(self, images):  # a list of maps (rows, columns, 5)
        return [self.layers(image[None])[0].permute(1, 2, 0) for image in images]


def loss_of(outputs, boxes):  # the mean over images
    losses = []
    for output, target in zip(outputs, boxes, strict=True):
        centres = ((target[:, :2] + target[:, 2:] / 2) / 4).long()
        there = torch.zeros_like(output[..., 0]).index_put((centres[:, 1], centres[:, 0]), torch.ones(()).to(output))
        exact = torch.cat([(target[:, :2] + target[:, 2:] / 2) / 4 - centres, target[:, 2:] / 8], 1)
        at = output[centres[:, 1], centres[:, 0], 1:]
        losses.append(
            binary_cross_entropy_with_logits(output[..., 0], there, reduction="sum") / 10 + l1_loss(at, exact)
        )
    return torch.stack(losses).mean()


def found_in(outputs):  # for each image (score, x, y, width, height) of the maxima above 0.1
    found = []
    for output in outputs:
        score = output[..., 0].sigmoid()
        peaks = (score == max_pool2d(score[None], 3, 1, 1)[0]) & (score > 0.1)
        (y, x), at = peaks.nonzero().T, output[peaks]
        size = at[:, 3:] * 8
        corner = (torch.stack([x, y], 1) + at[:, 1:3]) * 4 - size / 2
        found.append(torch.cat([score[peaks][:, None], corner, size], 1))
    return found


def build_model(width: int = 16):
    return Detector(width)


def build_dataloaders(samples: int = 400, batch_size: int = 16):
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(drawings(samples, 0), batch_size, shuffle=True, collate_fn=collate, generator=generator)
    return train, DataLoader(drawings(samples // 4, 1), 50, collate_fn=collate)


def build_optimizer(model, lr: float = 5e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, images, boxes):
    return loss_of(model(images), boxes)


def valid_step(model, images, boxes):
    outputs = model(images)
    return {"loss": loss_of(outputs, boxes), "ap": (found_in(outputs), boxes)}


def build_metrics():
    return {"ap": average_precision}


def predict_step(model, images):
    return [{"boxes": found[:, 1:].tolist(), "scores": found[:, 0].tolist()} for found in found_in(model(images))]
