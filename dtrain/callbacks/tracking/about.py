"""What trackers are told of a run once: its config, versions, code and net. Nothing of environment, command or user."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dtrain import __version__
from dtrain.config import Settings
from dtrain.config.flat import flatten

if TYPE_CHECKING:
    from torch import nn


def about_run(settings: Settings, module: nn.Module, *, ranks: int, device: str, code: str | None) -> dict[str, Any]:
    """Returns what is told besides the config.

    Args:
        settings: the run's config.
        module: the net.
        ranks: how many ranks work.
        device: their kind, such as "cuda".
        code: the commit of the recipe's checkout, where there is one.
    """
    parameters = list(module.parameters())
    return {
        "dtrain": __version__,
        "torch": metadata.version("torch"),
        "code": code,
        "recipe": settings.config.recipe.rpartition("/")[2],
        "ranks": ranks,
        "device": device,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "model": _layers(module),
    }


def _layers(module: nn.Module) -> str:
    """The net's layers and sizes, by torchinfo, which runs nothing for it."""
    from torchinfo import summary

    training = module.training
    try:
        return str(summary(module, verbose=0, depth=4))
    finally:
        module.train(training)


def as_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree of mappings as dotted keys; what no tracker takes as a parameter becomes text."""
    kinds = (bool, int, float, str)
    return {name: value if isinstance(value, kinds) else str(value) for name, value in flatten(values).items()}
