"""What a recipe, its engine and this machine allow a bench to try."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from dtrain.config import Settings
from dtrain.data.dataloaders import has_indices
from dtrain.data.device_data import obstacle
from dtrain.data.fetch import RowsOf, fetched_by_batch
from dtrain.data.samplers import index_batches
from dtrain.distributed.world import World
from dtrain.engine.loop import Engine
from dtrain.model.precision import chosen
from dtrain.recipe.loader import Recipe
from dtrain.tools.bench.advice import BenchResult, shares_of
from dtrain.tools.bench.candidates import Facts
from dtrain.tools.bench.engines import takes_fused

_BF16_ON_CPU = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def facts_of(recipe: Recipe, settings: Settings, engine: Engine, found: BenchResult, *, compile: bool) -> Facts:
    """Returns what decides on the candidates.

    Args:
        recipe: the user's file.
        settings: the config.
        engine: has trained as the config says.
        found: what was measured.
        compile: whether torch.compile is to be tried.
    """
    task, world, train = engine.task, engine.world, settings.config.train
    loader: Any = task.dl_train if isinstance(task.dl_train, DataLoader) and has_indices(task.dl_train) else None
    batch = None if loader is None else _batch(loader, world, train.batch)
    more: dict[str, Any] = {}
    if loader is not None:
        more = {
            "workers": loader.num_workers,
            "whole": isinstance(fetched_by_batch(loader)[0], RowsOf),
            "pinned": bool(loader.pin_memory),
            "could_be": obstacle(loader, fetch_batches=train.fetch_batches, indexed=True) is None,
        }
        values = {"num_workers": loader.num_workers, "pin_memory": bool(loader.pin_memory), "batch_size": batch}
        more["keys"] = _keys(recipe, settings, {"data": values, "optimizer": {"fused": False}})
    return Facts(
        cuda=world.device.type == "cuda",
        bf16=computes_in_bf16(world.device),
        data=shares_of(found)["data"],
        cores=max(1, _cores() // world.local_size),
        train=dict(train),
        precision=chosen(train.precision, world),
        batch=batch,
        on_device=str(getattr(engine.train_loader, "on_device", "")).startswith("train ("),
        optimizer=takes_fused(task.optimizer) if getattr(task.module, "optimizer", None) is task.optimizer else "",
        images=found.images and any(parameter.ndim == 4 for parameter in task.module.parameters()),
        compile=compile,
        **more,
    )


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself, and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in _BF16_ON_CPU)


def _batch(loader: DataLoader[Any], world: World, whose: str) -> int | None:
    """Returns the loader's batch size where each rank has at least two steps with one twice as large."""
    batches = index_batches(loader)
    if type(batches) is not BatchSampler:
        return None
    sampler: Any = batches.sampler
    ranks = world.size if whose == "per_rank" else 1
    return batches.batch_size if len(sampler) >= 4 * batches.batch_size * ranks else None


def _keys(recipe: Recipe, settings: Settings, values: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Returns those arguments that a builder's parameter of their name seems to set: it has the value that they have.

    Args:
        recipe: the user's file.
        settings: the config.
        values: section -> argument -> its value now.
    """
    keys = {}
    taken = recipe.parameters()
    for section, arguments in values.items():
        for argument, value in arguments.items():
            if argument not in taken.get(section, ()):
                continue
            given = {**recipe.builders[section].defaults(), **getattr(settings.config, section)}
            if given.get(argument) == value:
                keys[argument] = f"{section}.{argument}"
    return keys


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
