"""List states that hold more than tensors, as detection's masks, are kept in a checkpoint within an epoch."""

from __future__ import annotations

import json
from typing import Any

import torch
import torchmetrics

from dtrain.checkpoint.tree import flatten, unflatten
from dtrain.engine.synced_metrics import load_metric_state, metric_state


class Masks(torchmetrics.Metric):
    """Keeps a size and bytes for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("boxes", [], dist_reduce_fx=None)
        self.add_state("masks", [], dist_reduce_fx=None)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, boxes: Any) -> None:
        self.boxes.append(boxes)  # type: ignore[operator, union-attr]
        self.masks.append(((3, 4), b"abc"))  # type: ignore[operator, union-attr]
        self.count += 1

    def compute(self) -> Any:
        return self.count


def test_they_come_back_as_they_were() -> None:
    metric, again = Masks(), Masks()
    metric.update(torch.ones(2, 4))
    structure, tensors = flatten(metric_state(metric), "rank-0")
    load_metric_state(again, unflatten(json.loads(json.dumps(structure)), tensors))
    assert again.masks == [((3, 4), b"abc")] and torch.equal(again.boxes[0], torch.ones(2, 4))  # type: ignore[index]
    assert again.count == 1
