"""Whether a checkpoint is this run's: compared before anything is changed, each difference by its name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from dtrain import __version__
from dtrain.checkpoint.weights import WEIGHTS, check_fit
from dtrain.config import RunConfig, Settings
from dtrain.config.flat import flatten
from dtrain.engine import Engine
from dtrain.errors import UsageError
from dtrain.launch.fingerprint import file_hash
from dtrain.plateau import watched_column
from dtrain.recipe_file import locate
from dtrain.resuming.changed import beginning_of, holds
from dtrain.resuming.kept import check_kept
from dtrain.resuming.state import State, at_first, check_order, find_optimizers

logger = logging.getLogger(__name__)

# What may differ from the run so far: it changes no number of it.
FREE = (
    "recipe",  # compared by its content
    "train.epochs",
    "train.log_step_freq",
    "train.hang_seconds",
    "train.stop_seconds",
    "train.nan",
    "train.profile",
    "train.profile_ranks",
    "train.log_norms",
    "train.average",  # the last digits apart
    "train.compile",  # the last digits apart, of which a warning tells
    "train.activation_checkpointing",
    "train.val_every_steps",
    "train.shard",
    "train.shard_modules",
    "train.reshard_after_forward",
    "train.validate_whole",
    "checkpoint.",
    "early_stopping.",
    "track.",
    "run.",
)


def facts_of(engine: Engine, settings: Settings) -> dict[str, Any]:
    """Returns what a checkpoint says of its run besides the state; JSON."""
    return {
        "format": 1,
        "dtrain": __version__,
        "torch": str(torch.__version__),
        "ranks": engine.world.size,
        "device": engine.world.device.type,
        "config": settings.plain(),
        "recipe": recipe_facts(settings),
        "data": beginning_of(engine).lengths,
        "plateau": watched_column(engine),
    }


def recipe_facts(settings: Settings) -> dict[str, str]:
    """Returns a recipe's name and the hash of its file; a module counts by its name."""
    path = locate(settings.config.recipe, settings.base)
    if path is None:
        return {"name": settings.config.recipe, "content": ""}
    return {"name": path.name, "content": file_hash(path)}


def check_facts(there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings, *, strict: bool) -> None:
    """Compares what a checkpoint says of its run with the run that shall go on from it.

    Args:
        there: the manifest.
        here: what `facts_of` returns.
        settings: the config, which knows where each value came from.
        strict: whether a recipe whose content has changed is refused.

    Raises:
        UsageError: they differ in what the numbers depend on; every difference is named.
    """
    differences = config_differences(there["config"], here["config"], settings)
    differences += [
        f"the number of {name} was {there['data'].get(name, 'not known')} and is {count}"
        for name, count in here["data"].items()
        if there["data"].get(name) != count
    ]
    if "plateau" in there and there["plateau"] != here.get("plateau"):
        differences.append(
            f"the column that ReduceLROnPlateau watches was {there['plateau']} and is {here.get('plateau')} "
            "(scheduler.monitor, else checkpoint.monitor)"
        )
    if there["recipe"]["name"] != here["recipe"]["name"]:
        differences.append(f"the recipe was {there['recipe']['name']} and is {here['recipe']['name']}")
    elif there["recipe"]["content"] != here["recipe"]["content"]:
        told = f"the content of {here['recipe']['name']} has changed"
        if strict:
            differences.append(f"{told} (--resume RUN goes on all the same)")
        else:
            logger.warning("%s since the checkpoint was saved; it is gone on from all the same", told)
    if differences:
        raise UsageError(
            "the checkpoint is another run's: "
            + "; ".join(differences)
            + ". Give the values of the run (`dtrain train --resume RUN` alone has them), or another run.name. What "
            "changes no number may differ, such as train.epochs (all: docs/checkpoints.md)."
        )
    before, now = (values["config"].get("train", {}).get("compile") or None for values in (there, here))
    if before != now:
        logger.warning("train.compile was %s and is %s: the last digits may differ", before, now)
    for name in ("dtrain", "torch", "device"):
        if there[name] != here[name]:
            logger.warning("%s was %s and is %s: the last digits may differ", name, there[name], here[name])


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings) -> list[str]:
    """Returns, in words, the values that differ and that the numbers depend on."""
    # A builder's default counts as given: the recipe's content, compared besides, says what it was. So does that of a
    # key that was not there yet in the dtrain that saved the checkpoint.
    defaults = {**flatten(RunConfig().model_dump()), **settings.defaults}
    before, now = ({**defaults, **flatten(values)} for values in (there, here))
    return [
        f"{key} was {before.get(key, 'not given')!r} and is {now.get(key, 'not given')!r} ({settings.place_of(key)})"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and not key.startswith(FREE)
    ]


def check_ranks(there: Mapping[str, Any], step: int | None, ranks: int, settings: Settings) -> None:
    """Whether a run may go on with this number of ranks.

    Raises:
        UsageError: it would no longer take the same global batches.
    """
    before, train = there["ranks"], settings.config.train
    if before == ranks or train.batch == "global":
        return
    reason = (
        f"the run had {before} ranks and now has {ranks}, and with train.batch=per_rank a global batch is one batch of "
        f"each rank: it would go on with batches of another size"
    )
    if not settings.config.checkpoint.change_ranks:
        raise UsageError(
            f"{reason}. Start {before} ranks; or give checkpoint.change_ranks=true, with which it goes on so from the "
            "start of an epoch. A run that is begun with train.batch=global goes on with any number."
        )
    if step is not None:
        raise UsageError(f"{reason}, which it can from the start of an epoch alone, and there is no such checkpoint.")


def check_shapes(engine: Engine, weights: Mapping[str, Any], run: State, ranks: list[State], where: str) -> None:
    """Compares a saved state with the engine's net, optimizers, schedule and further objects.

    Raises:
        UsageError: one does not fit; it is named with both sides.
        CheckpointError: an optimizer is not to be found.
    """
    task = engine.task
    check_fit(task.module, weights, f"{where}/{WEIGHTS}")
    for optimizer, saved in zip(find_optimizers(run["optimizers"], task), run["optimizers"], strict=True):
        _same("the optimizer", saved["kind"], type(optimizer).__qualname__, where)
        groups = holds(optimizer, task.module)
        held = at_first(saved)
        _same("the number of the optimizer's groups", len(held), len(groups), where)
        for number, (there, here) in enumerate(zip(held, groups, strict=True)):
            _same(f"group {number} of the optimizer's parameters", there, here, where)
    _same("the scheduler", _kind(run["scheduler"]), _name(task.scheduler), where)
    _same("what else has a state", sorted(run["others"]), sorted(task.others), where)
    for name, saved in run["others"].items():
        _same(name, saved["kind"], _name(task.others[name]), where)
    check_order(engine, ranks[0])
    check_kept(engine, ranks[0], where)


def _kind(saved: State | None) -> str | None:
    return None if saved is None else saved["kind"]


def _name(thing: Any) -> str | None:
    return None if thing is None else type(thing).__qualname__


def _same(what: str, there: Any, here: Any, where: str) -> None:
    if there != here:
        raise UsageError(f"{where} does not fit the recipe: {what} was {there} and is {here}.")
