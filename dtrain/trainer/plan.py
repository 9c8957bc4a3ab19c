"""What a run would do, without doing it: `dtrain train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtrain.config import BUILDER_SECTIONS, Settings
from dtrain.config.schema import leaves
from dtrain.data.device_data import dry_words
from dtrain.data.loader_group import train_splits
from dtrain.distributed.fsdp_settings import Sharding
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import by_name, split_of
from dtrain.masking import masked
from dtrain.model.fsdp_parts import parts_of
from dtrain.recipe.loader import Recipe
from dtrain.recipe.supplied import epoch_length, rank_steps
from dtrain.trainer.setup import loader_batch, run_epochs, step_samples


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Attributes:
        ranks: number of ranks.
        batch_per_rank: samples per rank takes per step, None where the loader cannot tell.
        batch_in_all: samples of an optimizer step.
        steps_per_epoch: train steps (micro-batches) of each rank per epoch, None where the loader cannot tell.
        epochs: at most so many.
        optimizer_steps: of the whole run.
        data_on_device: in words, which data are kept on the GPU, or why not.
        cuda_graph: in words, whether steps are captured; "" where that is not asked for.
    """

    ranks: int
    batch_per_rank: int | None
    batch_in_all: int | None
    steps_per_epoch: int | None
    epochs: int
    optimizer_steps: int | None
    data_on_device: str = ""
    cuda_graph: str = ""


def make_plan(task: Task, settings: Settings, ranks: int, *, cpu: bool = False) -> Plan:
    """Works out a run's sizes from its loaders.

    Args:
        task: the recipe's objects.
        settings: the config.
        ranks: how many there are to be.
        cpu: whether they compute on the CPU.

    Raises:
        UsageError: how long it is cannot be known; or a part of the net that `train.shard_modules` names is not there.
    """
    train = settings.config.train
    if train.shard_modules is not None:
        parts_of(task.module, Sharding(tuple(train.shard_modules)))
    epochs, by_rank = run_epochs(task, ranks, settings), task.batches.by_rank
    length = epoch_length(task.dl_train, ranks, settings, by_rank=by_rank)
    steps = rank_steps(task.dl_train, ranks, train, by_rank=by_rank) if length is None else length * train.accumulation
    size = loader_batch(task)
    per_rank = in_all = None
    if size is not None:
        per_rank = size if train.batch == "per_rank" else -(-size // ranks)
        in_all = step_samples(size, ranks, train)
    total = None if steps is None else -(-steps // train.accumulation) * epochs
    bounds = [bound for bound in (total, train.max_steps) if bound is not None]
    loaders = train_splits(task.dl_train) | {split_of(name): one for name, one in by_name(task.dl_valid).items()}
    how: dict[str, Any] = {"fetch_batches": train.fetch_batches, "cpu": cpu}
    placed = dry_words(train.data_on_device, loaders, **how)
    return Plan(
        ranks,
        per_rank,
        in_all,
        steps,
        epochs,
        min(bounds, default=None),
        placed,
        _graph_words(settings, ranks, cpu=cpu),
    )


def _graph_words(settings: Settings, ranks: int, *, cpu: bool) -> str:
    if not settings.config.train.cuda_graph:
        return ""
    if cpu or ranks > 1:
        return f"refused: {'ranks compute on the CPU' if cpu else f'it is for one rank, and there are {ranks}'}"
    return "yes (experimental)"


def value_rows(settings: Settings, recipe: Recipe) -> list[tuple[str, str, str]]:
    """Returns every value of a run as (key, value, where it came from), defaults of the recipe included."""
    rows = []
    for key in leaves():
        node: Any = settings.config
        for part in key.split("."):
            node = getattr(node, part, None)
        if (node is not None or key in settings.places) and key != "defaults":
            rows.append((key, str(masked(key, node)), settings.place_of(key)))
    for section in BUILDER_SECTIONS:
        given = getattr(settings.config, section)
        builder = recipe.builders.get(section)
        defaults = builder.defaults() if builder is not None else {}
        for name in [*defaults, *(n for n in given if n not in defaults)]:
            place = settings.place_of(f"{section}.{name}")
            if name not in given and builder is not None:
                place = f"default of {builder.name}"
            value = masked(f"{section}.{name}", given.get(name, defaults.get(name)))
            rows.append((f"{section}.{name}", str(value), place))
    return rows


def plan_text(plan: Plan, rows: list[tuple[str, str, str]]) -> str:
    """Returns a plan and the values as a table for a person."""
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {place}" for key, value, place in rows]
    sizes = [
        ("ranks", plan.ranks),
        ("batch per rank", plan.batch_per_rank),
        ("global batch size", plan.batch_in_all),
        ("steps per epoch", plan.steps_per_epoch),
        ("epochs", plan.epochs),
        ("total optimizer steps", plan.optimizer_steps),
    ]
    lines += ["", *(f"{name:<24}  {'unknown: the loader has no length' if n is None else n}" for name, n in sizes)]
    lines.append(f"{'data on the GPU':<24}  {plan.data_on_device}")
    lines += [f"{'CUDA graph of the step':<24}  {plan.cuda_graph}"] if plan.cuda_graph else []
    return "\n".join([*lines, "", "Nothing was started (--dry-run)."])
