"""Whether a checkpoint is this run's: compared before anything is changed, each difference by its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from dtrain import __version__
from dtrain.checkpoint.code import code_facts
from dtrain.checkpoint.locate import Loaded
from dtrain.checkpoint.sources import check_kept, check_own_streams
from dtrain.checkpoint.state import State, at_first, check_order, find_optimizers
from dtrain.checkpoint.trainable import beginning_of, holds
from dtrain.checkpoint.weights import WEIGHTS, check_fit
from dtrain.config import BUILDER_SECTIONS, RunConfig, Settings
from dtrain.config.calls import is_call, way
from dtrain.config.flat import flatten
from dtrain.config.renamed import renamed
from dtrain.engine.loop import Engine
from dtrain.engine.monitored import watched_column
from dtrain.errors import UsageError
from dtrain.layout import CONFIG
from dtrain.masking import masked
from dtrain.provenance.opened import opened_files
from dtrain.wording import counted

logger = logging.getLogger(__name__)

# What may differ from the run so far: it changes no number of it.
FREE = (
    "recipe",  # compared by its name and code
    "defaults",  # which of the values are such; the values are compared
    "train.epochs",
    "train.log_step_freq",
    "train.hang_seconds",
    "train.stop_seconds",
    "train.nan",
    "train.profile",
    "train.profile_ranks",
    "train.log_norms",
    "train.data_on_device",
    "train.prefetch_to_device",
    "train.average",  # the last digits apart
    "train.compile",  # the last digits apart, of which a warning tells
    "train.cuda_graph",  # the last digits apart
    "train.activation_checkpointing",
    "train.val_every_steps",
    "train.shard",
    "train.shard_modules",
    "train.reshard_after_forward",
    "train.gather_for_validation",
    "checkpoint.",
    "early_stopping.",
    "track.",
    "run.",
)


_NOT_GIVEN = "not given"


def facts_of(engine: Engine, config: Mapping[str, Any], run: Path | None = None) -> dict[str, Any]:
    """Returns what a checkpoint says of its run besides the state; JSON.

    Args:
        engine: has the task that was loaded.
        config: as `Settings.plain` returns it.
        run: the run's folder, in which the sources are kept; None for nowhere.
    """
    code = engine.task.code
    return {
        "format": 2,
        "dtrain": __version__,
        "torch": str(torch.__version__),
        "ranks": engine.world.size,
        "device": engine.world.device.type,
        "config": config,
        "recipe": {
            "name": recipe_name(config["recipe"]),
            "content": "" if code is None else code.hashes().get(code.name, ""),
        },
        "code": None if code is None else code_facts(code, run),
        "opened": {} if code is None else opened_files.marks(set(code.places.values()), run),
        "data": beginning_of(engine).lengths,
        "plateau": watched_column(engine),
    }


def recipe_name(reference: str) -> str:
    """Returns the name of a recipe's file, wherever that lies, or of its module."""
    return Path(reference).name if reference.endswith(".py") or "/" in reference else reference


def check_facts(there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings) -> None:
    """Compares what a checkpoint says of its run with the run that shall go on from it.

    Args:
        there: the manifest.
        here: what `facts_of` returns.
        settings: the config, which knows where each value came from.

    Raises:
        UsageError: they differ in what the numbers depend on; every difference is named.
    """
    of, this = (str(facts["config"].get("recipe", "")) for facts in (there, here))
    if of != this and (is_call(of) or is_call(this)):
        raise UsageError(
            f"the folder has a run of {of}, which {this} cannot resume. Choose another {way(settings, 'run.name')}."
        )
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
    if differences:
        hint = _hint_of_paths(there["config"], here["config"], settings)
        raise UsageError(
            "the config does not match the checkpoint's: "
            + "; ".join(differences)
            + f". Use the run's values ({_where(settings)}), or another {way(settings, 'run.name')}.{hint} Keys "
            f"that don't affect results, such as {way(settings, 'train.epochs')}, may change (all of them: "
            "docs/checkpoints.md)."
        )
    _tell_moved(there["config"], here["config"], settings)
    _warn_of_curve(there["config"].get("train", {}), here["config"].get("train", {}))
    before, now = (values["config"].get("train", {}).get("compile") or None for values in (there, here))
    if before != now:
        logger.warning("train.compile was %s and is %s: the last digits may differ", before, now)
    for name in ("dtrain", "torch", "device"):
        if there[name] != here[name]:
            logger.warning("%s was %s and is %s: the last digits may differ", name, there[name], here[name])


def _where(settings: Settings) -> str:
    if is_call(settings.config.recipe):
        return f"they are in {CONFIG} of its folder"
    return "`dtrain train --resume RUN` takes them from the run"


def _warn_of_curve(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Says that a learning rate which goes down to the end of the run goes to another end from here on."""
    shape, before, now = here.get("schedule"), there.get("epochs"), here.get("epochs")
    if shape in ("linear", "cosine") and before != now:
        logger.warning(
            "train.epochs was %s and is %s: from here on the learning rate follows the %s curve to epoch %s, so that "
            "the history is not that of a run which had this length from the start. Where that matters, begin a run "
            "with all its epochs (another run.name).",
            *(before, now, shape, now),
        )
    if here.get("swa_from") is not None and before != now:
        logger.warning(
            "train.epochs was %s and is %s: train.swa_from = %s is another step now, and the average begins there",
            *(before, now, here["swa_from"]),
        )


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings) -> list[str]:
    """Returns, in words, the values that differ and that the numbers depend on."""
    differing = _differing(there, here, settings)
    gone = there.get("defaults", ())  # of a parameter that the recipe no longer has; its code is compared
    others = tuple(f"{key.removesuffix('.class')}." for key in differing if key.endswith(".class"))  # of another class
    return [
        f"{key} was {before!r} and is {now!r} ({settings.origin(key)})"
        for key, (before, now) in differing.items()
        if not key.startswith(FREE)
        and not _is_moved(key, before, now, settings)
        and not (key in gone and now == _NOT_GIVEN)
        and not (key.startswith(others) and _NOT_GIVEN in (before, now))
    ]


def differences_before_training(there: Settings, here: Settings) -> list[str]:
    """Returns the same of a run that has no checkpoint yet: for it, the recipe may have changed its defaults."""
    before, now = there.plain(), here.plain()
    for key in set(before.get("defaults", ())) & set(now.get("defaults", ())):
        section, _, name = key.partition(".")
        before[section][name] = now[section][name]
    return config_differences(before, now, here)


def _differing(
    there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings
) -> dict[str, tuple[object, object]]:
    """Returns key -> both values, of those that differ."""
    # A builder's default counts as given: the recipe's content, compared besides, says what it was. So does that of a
    # key that was not there yet in the dtrain that saved the checkpoint.
    defaults = {**flatten(RunConfig().model_dump()), **settings.defaults, **settings.written}
    # Checkpoints of older versions have secrets as they were.
    before, now = (masked("", {**defaults, **renamed(flatten(values))}) for values in (there, here))
    return {
        key: (before.get(key, _NOT_GIVEN), now.get(key, _NOT_GIVEN))
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    }


def _is_moved(key: str, before: object, now: object, settings: Settings) -> bool:
    """Whether a value is the path, or as many paths, of what may be the same thing: its builder calls it a path."""
    if isinstance(before, list) and isinstance(now, list):
        return key in settings.paths and len(before) == len(now)
    return key in settings.paths and all(isinstance(one, (str, PurePath)) for one in (before, now))


def _tell_moved(there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings) -> None:
    """Says which paths are not what they were: what is there is compared besides, as far as that can be."""
    for key, (before, now) in _differing(there, here, settings).items():
        if _is_moved(key, before, now, settings) and str(before) != str(now):
            logger.warning(
                "%s was %s and is %s (%s): a path, so it is taken for the same thing moved",
                *(key, before, now, settings.place_of(key)),
            )


def _hint_of_paths(there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings) -> str:
    """Returns what lets a path change that its builder does not call one; nothing where there is none."""
    for key, values in _differing(there, here, settings).items():
        section, _, name = key.partition(".")
        texts = [one for one in values if isinstance(one, str) and os.sep in one]
        if len(texts) == len(values) and section in BUILDER_SECTIONS and key not in settings.paths:
            return (
                f" If {key} only says where the same data are, annotate it in {BUILDER_SECTIONS[section]} "
                f"({name}: Path) and resume once with checkpoint.accept=code: a path may change."
            )
    return ""


def check_ranks(there: Mapping[str, Any], step: int | None, ranks: int, settings: Settings) -> None:
    """Whether a run may go on with this number of ranks.

    Raises:
        UsageError: it would no longer take the same global batches.
    """
    before, train = there["ranks"], settings.config.train
    if before == ranks or train.batch == "global":
        return
    reason = (
        f"the run had {counted(before, 'rank')} and now has {ranks}, and with train.batch=per_rank the global batch "
        "size would change"
    )
    if not settings.config.checkpoint.change_ranks:
        raise UsageError(
            f"{reason}. Start {counted(before, 'rank')}; or set {way(settings, 'checkpoint.change_ranks', True)} to "
            "resume anyway, from the start of an epoch. A run with "
            f"{way(settings, 'train.batch', 'global')} can resume on any number of ranks."
        )
    if step is not None:
        raise UsageError(
            f"{reason}, which is only possible from the start of an epoch, or of a pass over the data with "
            "train.epoch_steps, and there is no such checkpoint."
        )


def check_shapes(engine: Engine, loaded: Loaded) -> None:
    """Compares a saved state with the engine's net, optimizers, schedule and further objects.

    Raises:
        UsageError: one does not fit; it is named with both sides.
        CheckpointError: an optimizer is not to be found.
    """
    task, run, ranks, where = engine.task, loaded.run, loaded.ranks, str(loaded.path)
    check_fit(task.module, loaded.weights, f"{where}/{WEIGHTS}", loaded.left_out)
    for optimizer, saved in zip(find_optimizers(run["optimizers"], task), run["optimizers"], strict=True):
        _same("the optimizer", saved["kind"], type(optimizer).__qualname__, where)
        groups = holds(optimizer, task.module)
        held = at_first(saved)
        _same("the number of the optimizer's groups", len(held), len(groups), where)
        for number, (there, here) in enumerate(zip(held, groups, strict=True)):
            _same(f"group {number} of the optimizer's parameters", there, here, where)
    _same("the scheduler", _kind(run["scheduler"]), _name(task.scheduler), where)
    _same("the other objects with a state", sorted(run["others"]), sorted(task.others), where)
    for name, saved in run["others"].items():
        _same(name, saved["kind"], _name(task.others[name]), where)
    check_order(engine, ranks[0])
    check_kept(engine, ranks[0], where)
    check_own_streams(engine, ranks, within=run["step"] is not None)


def _kind(saved: State | None) -> str | None:
    return None if saved is None else saved["kind"]


def _name(thing: Any) -> str | None:
    return None if thing is None else type(thing).__qualname__


def _same(what: str, there: Any, here: Any, where: str) -> None:
    if there != here:
        raise UsageError(f"{where} does not match: {what} was {there} and is {here}.")
