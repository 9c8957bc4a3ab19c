"""What rank 0 says of a run before its first step: three lines, of what is known by then and costs nothing to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.data.dataloaders import has_indices
from dtrain.data.loader_group import batch_size_of, train_by_name
from dtrain.distributed.world import World
from dtrain.engine.loop import Engine
from dtrain.model.precision import chosen
from dtrain.wording import counted, large


def banner(engine: Engine, *, run: Path | None = None, keep: str = "") -> str:
    """Returns the lines: device, ranks, precision, parameters and folder; the data and the steps; the global batch.

    Args:
        engine: it is about to train.
        run: the run's folder; None where it has none.
        keep: how the batch would stay one rank's, on several: "train.batch=global", as it is written there.
    """
    world, train = engine.world, engine.train_loader
    precision = chosen(engine.options.precision, world)
    first = f"device: {_device(world)}, {counted(world.size, 'rank')}, {precision}"
    first += (
        f"{', CUDA graph of the step (experimental)' if engine.captured else ''}; {_parameters(engine.task.module)}"
    )
    samples = [f"{_all_samples([*train_by_name(train.loader).values()])} train"]
    samples += [f"{_all_samples([part.loader.loader for part in engine.valid.parts])} valid"] if engine.valid else []
    batch = batch_size_of(train.loader)
    steps = engine.updates_in_all()
    parts = [f"data: {', '.join(samples)} samples"]
    parts += [f"batch {batch}"] if batch is not None and world.size == 1 and engine.options.accumulation == 1 else []
    if steps is not None:
        done = f"{engine.place.updates:,} of " if engine.place.updates else ""
        parts.append(f"{done}{counted(steps, 'optimizer step')} in {counted(engine.epochs, 'epoch')}")
    last = "" if batch is None else batch_words(engine, batch, keep)
    return "\n".join([first + ("" if run is None else f"; run: {run}"), "; ".join(parts), *([last] if last else [])])


def batch_words(engine: Engine, batch: int, keep: str = "") -> str:
    """Returns "2 ranks x batch 32 = 64 samples per step", of a loader's batch size; "" where it is that of a step.

    Args:
        engine: of the run.
        batch: the training loader's batch size.
        keep: as for `banner`.
    """
    ranks, options = engine.world.size, engine.options
    if ranks == 1 and options.accumulation == 1:
        return ""
    times = f" x accumulation {options.accumulation}" if options.accumulation > 1 else ""
    if options.batch == "global":
        each = f": {-(-batch // ranks)} per rank on {ranks} ranks" if ranks > 1 else ""
        every = f" = {batch * options.accumulation} samples per step" if times else ""
        return f"global batch {batch}{times}{every}{each}"
    many = f"{ranks} ranks x " if ranks > 1 else ""
    words = f"{many}batch {batch}{times} = {batch * ranks * options.accumulation} samples per step"
    kept = (
        f"; {keep} keeps {batch * options.accumulation}" if keep and ranks > 1 and not engine.train_loader.own else ""
    )
    return words + kept


def _device(world: World) -> str:
    if world.device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(world.device)})"
    if world.device.type == "cpu":
        return f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    return str(world.device.type)


def _parameters(module: nn.Module) -> str:
    """How many numbers the net has, and how many of them are trained where not all are."""
    try:
        every = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    except (ValueError, RuntimeError):  # a lazy module has no shapes yet
        return "lazy parameters"
    total, trained = sum(size for size, _ in every), sum(size for size, trains in every if trains)
    words = f"{large(total)} {'parameter' if total == 1 else 'parameters'}"
    return words if trained == total else f"{words}, {large(trained)} trained"


def _all_samples(loaders: list[Any]) -> str:
    counts = [_count(loader) for loader in loaders]
    known = [count for count in counts if count is not None]
    return f"{sum(known):,}" if len(known) == len(counts) else "streamed"


def _count(loader: Any) -> int | None:
    """Samples of a pass; None where the loader has no indices, so that nobody knows before it is over."""
    if not has_indices(loader):
        return None
    try:
        sampler = getattr(loader, "sampler", None)
        return len(loader.dataset if sampler is None else sampler)
    except TypeError:  # a sampler of the user's own need not know
        return None
