"""What a `KerasModel` computes for a batch: its loss and metrics, as a step of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dtrain.engine.synced_metrics import is_torchmetric
from dtrain.errors import UsageError


class KerasSteps:
    """The step of a loss function and metrics; declarative, so that the engine learns.

    Args:
        loss_fn, metrics: of the `KerasModel`.
    """

    def __init__(self, loss_fn: Callable[..., Any], metrics: Mapping[str, Any]) -> None:
        self._loss_fn = loss_fn
        self._metrics = metrics

    def step(self, model: Any, features: Any, labels: Any) -> dict[str, Any]:
        """Returns the loss, with its graph, and the metrics."""
        predictions = model(features)
        if isinstance(self._loss_fn, nn.Module) and isinstance(labels, torch.Tensor):
            self._loss_fn.to(labels.device)  # class weights, say
        loss = self._loss_fn(predictions, labels)
        with torch.no_grad():
            return {"loss": loss} | {name: _value(m, predictions, labels) for name, m in self._metrics.items()}


def _value(metric: Any, predictions: Any, labels: Any) -> Any:
    if not is_torchmetric(metric):
        return metric(predictions, labels)
    return predictions, labels


def counts_epochs(scheduler: Any) -> bool:
    """Whether a scheduler counts epochs, and not optimizer steps."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the metrics by name.

    Raises:
        UsageError: one is neither a function nor a torchmetrics metric.
    """
    for name, metric in (metrics or {}).items():
        keeps_state = hasattr(metric, "compute") and hasattr(metric, "reset")
        if not callable(metric) or (keeps_state and not is_torchmetric(metric)):
            raise UsageError(
                f"metrics_dict[{name!r}] is a {type(metric).__name__}. Use a function (predictions, labels) -> mean, "
                "or a single torchmetrics metric; dtrain cannot reduce the state of anything else over the ranks."
            )
    return dict(metrics or {})
