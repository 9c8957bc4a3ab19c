"""What a builder gets where a parameter of it has such a name, and the config no value for it: how long the run is."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from inspect import Parameter
from typing import Any

from dtrain.config import Settings
from dtrain.config.schema import TrainConfig
from dtrain.data.combined import sharded
from dtrain.data.loader import is_own
from dtrain.data.partition import ShardSpec
from dtrain.data.rank_shards import DataSharding, refuse_global
from dtrain.errors import RecipeError
from dtrain.launch.env.rank_env import read_rank_facts

RANK = "rank"  # of the data's builder alone, whose streams are then this rank's part
_WORLD_SIZE, _EPOCHS, _STEPS_PER_EPOCH, _TOTAL_STEPS = "world_size", "epochs", "steps_per_epoch", "total_steps"
_ALWAYS = (_WORLD_SIZE, _EPOCHS)
_ONCE_LOADERS_ARE_THERE = (_STEPS_PER_EPOCH, _TOTAL_STEPS)
SUPPLIED: Mapping[str, tuple[str, ...]] = {
    "model": _ALWAYS,
    "data": (RANK, *_ALWAYS),
    "optimizer": (*_ALWAYS, *_ONCE_LOADERS_ARE_THERE),
    "scheduler": (*_ALWAYS, *_ONCE_LOADERS_ARE_THERE),
}


def supplied_names(section: str, parameters: Mapping[str, Parameter], given: Container[str]) -> list[str]:
    """Returns the parameters of a section's builder that get such a value: they have no default, or None, and no value.

    Args:
        section: of the config.
        parameters: of its builder, by name.
        given: the keys of the section that have a value.
    """
    return [
        name
        for name in SUPPLIED.get(section, ())
        if name in parameters and name not in given and _is_open(parameters[name].default)
    ]


def _is_open(default: Any) -> bool:
    return default is None or default is Parameter.empty


def supplied_values(  # noqa: PLR0913 - called at one place with all of them
    names: Sequence[str],
    parameters: Mapping[str, Parameter],
    dl_train: Any,
    settings: Settings,
    where: str,
    *,
    by_rank: bool,
) -> dict[str, int]:
    """Returns the values of these parameters, as far as they are known.

    Args:
        names: what `supplied_names` returned.
        parameters: of the builder, by name.
        dl_train: the training loader; None while there is none.
        settings: the config.
        where: the builder's "file:line".
        by_rank: as for `rank_steps`.

    Raises:
        RecipeError: a value is not known, since the loader has no length or is not there yet, and there is no default.
    """
    train, facts = settings.config.train, read_rank_facts()
    ranks = facts.size
    # Where max_steps alone says how long, the epochs are as many as that takes.
    limit = train.max_steps if "train.epochs" not in settings.places else None
    values = {RANK: facts.rank, _WORLD_SIZE: ranks} | (
        {_EPOCHS: train.epochs} if limit is None else {_TOTAL_STEPS: limit}
    )
    asked = [name for name in names if name not in values]
    each = train.epoch_steps
    if asked and dl_train is not None and each is None:
        each = epoch_length(dl_train, ranks, settings, by_rank=by_rank)
        each = each or optimizer_steps(dl_train, ranks, train, by_rank=by_rank)
    if each:
        epochs = train.epochs if limit is None else -(-limit // each)
        most = train.max_steps or epochs * each
        values |= {_STEPS_PER_EPOCH: each, _EPOCHS: epochs, _TOTAL_STEPS: min(epochs * each, most)}
    elif train.max_steps is not None:
        values[_TOTAL_STEPS] = train.max_steps
    missing = [n for n in names if n not in values and parameters[n].default is Parameter.empty]
    if missing:
        why = "only train.max_steps is set" if dl_train is None else "the training loader has no length, or no batch"
        if dl_train is not None and ranks > 1:
            why += ", or yields this rank's part alone"
        also = {_TOTAL_STEPS: ", or set train.max_steps", _EPOCHS: ", or set train.epochs"}.get(missing[0], "")
        raise RecipeError(
            f"{where} takes {missing[0]}, which is not known: {why}. Give it a value in the config, or a default{also}."
        )
    return {name: values[name] for name in names if name in values}


def rank_steps(dl_train: Any, ranks: int, train: TrainConfig, *, by_rank: bool) -> int | None:
    """Returns the train steps (micro-batches) of each rank in an epoch; None where the loader cannot tell its length.

    Args:
        dl_train: the training loader, as this process has it.
        ranks: how many there are.
        train: the config's section.
        by_rank: as in `dtrain.data.batches.BatchFunctions`.

    Raises:
        UsageError: the loader's sharding contradicts the config's.
    """
    facts = read_rank_facts()  # for which it was built; a plan may be of other ranks
    sharding: DataSharding = "loader" if by_rank and train.data_sharding == "auto" else train.data_sharding
    if ranks > 1 and is_own(dl_train, "train", facts.rank, facts.size, sharding):
        if train.batch == "global":
            raise refuse_global("train")
        return None  # a length is that of this rank's part, and other ranks may have more
    how = ShardSpec(0, ranks, train.batch, fill=True, limit=train.overfit_batches or train.limit_batches)
    return sharded(dl_train, how, train.seed, "train", sharding=sharding).steps()


def optimizer_steps(dl_train: Any, ranks: int, train: TrainConfig, *, by_rank: bool) -> int | None:
    """Returns the optimizer steps of an epoch, with one for each group of micro-batches."""
    steps = rank_steps(dl_train, ranks, train, by_rank=by_rank)
    return None if steps is None else -(-steps // train.accumulation)


def epoch_length(dl_train: Any, ranks: int, settings: Settings, *, by_rank: bool) -> int | None:
    """Returns the optimizer steps of an epoch that goes on with the data; None where an epoch is a pass over it.

    Where only `train.max_steps` says how long a run is, and the loader has no length, the run is one such epoch.
    """
    train = settings.config.train
    alone = train.max_steps is not None and "train.epochs" not in settings.places
    if train.epoch_steps is not None or not alone or train.limit_batches or train.overfit_batches:
        return train.epoch_steps
    return train.max_steps if rank_steps(dl_train, ranks, train, by_rank=by_rank) is None else None
