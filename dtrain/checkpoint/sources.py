"""What is kept besides net, optimizers and schedule: states of the loaders' parts, random streams on the net.

What has a state that no checkpoint can hold is refused by name before the first step.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from dtrain.checkpoint.extra import check_extra
from dtrain.checkpoint.generators import plain_generator
from dtrain.checkpoint.tensors import check_storable
from dtrain.checkpoint.tree import flatten
from dtrain.config.recipe_file import UNIMPORTABLE
from dtrain.data.loader import ShardedLoader
from dtrain.data.sources import Sources, load_state, parts_of
from dtrain.engine.loop import Engine
from dtrain.engine.passes import ValidPass
from dtrain.engine.valid_loaders import split_of
from dtrain.errors import DtrainError, UsageError
from dtrain.model.attributes import modules_of, numbers_in, quantities_of, streams_of

logger = logging.getLogger(__name__)

State = dict[str, Any]


def loaders_of(engine: Engine) -> dict[str, ShardedLoader]:
    """Returns the rank's views of the loaders by split."""
    return {"train": engine.train_loader} | {split_of(part.name): part.loader for part in validation_of(engine)}


def sources_of(engine: Engine) -> dict[str, Sources]:
    """Returns the loaders' parts by split."""
    return {split: loader.sources for split, loader in loaders_of(engine).items()}


def validation_of(engine: Engine) -> Sequence[ValidPass]:
    """Returns the passes that an engine's validation is made of, one for each loader."""
    return () if engine.valid is None else engine.valid.parts


def kept_state(engine: Engine, *, within: bool) -> State:
    """Returns what this rank has of them.

    Args:
        engine: where the run is.
        within: whether it is within a pass over the training data, of which its loader's states are those of its start.
    """
    sources = sources_of(engine)
    states = {split: source.after_epoch() for split, source in sources.items()}
    if within:
        states["train"] = sources["train"].began
    return {
        "sources": states,
        "datasets": sources["train"].states(datasets=True) if within else {},
        "place": _place(engine) if within else None,
        "streams": dict(streams_of(engine.task.module)),
    }


def _place(engine: Engine) -> State | None:
    """Returns where this rank's own stream is; without a state that a checkpoint cannot contain."""
    place = engine.train_loader.place
    if place is None:
        return None
    try:
        flatten(place["state"], "dl_train: state")
    except DtrainError as error:
        logger.warning("a resumed run reads the train stream from the epoch's beginning: %s", error)
        place = {**place, "state": None}
    return dict(place)


def replay_epochs(engine: Engine, epoch: int, *, trained: bool) -> None:
    """Tells the loaders' parts of the epochs before a resumed one, in their order.

    Args:
        engine: to be resumed.
        epoch: in which it begins.
        trained: whether that one's train pass is over.
    """
    sources, position = sources_of(engine), engine.train_loader.position
    for earlier in range(1, epoch):
        for split, source in sources.items():
            if split != "train" or position is None:
                source.replay(earlier)
    if position is not None:
        for earlier in range(1, position[0]):
            sources["train"].replay(earlier)
    elif trained:
        sources["train"].replay(epoch)


def load_kept(engine: Engine, saved: Mapping[str, Any]) -> None:
    """Puts back what `kept_state` returned, but for the datasets, which a resumed epoch may read from its beginning."""
    states = saved.get("sources", {})
    for split, source in sources_of(engine).items():
        source.load(states.get(split, {}))
    engine.train_loader.resume_at(saved.get("place"))
    streams = streams_of(engine.task.module)
    for name, stream in saved.get("streams", {}).items():
        if name in streams:
            load_state(streams[name], stream)


def load_datasets(engine: Engine, saved: Mapping[str, Any]) -> None:
    """Puts the training datasets to where they were, once the resumed epoch is where it was."""
    engine.train_loader.sources.load(saved.get("datasets", {}))


def check_kept(engine: Engine, saved: Mapping[str, Any], where: str) -> None:
    """Compares what the loaders keep a state of with what was saved.

    Raises:
        UsageError: they are not the same parts; the first that differs is named.
    """
    for split, source in sources_of(engine).items():
        there = {name: one["kind"] for name, one in saved.get("sources", {}).get(split, {}).items() if _own(one)}
        here = {n: type(part).__qualname__ for n, part in source.stateful().items() if plain_generator(part) is None}
        for name in there if "sources" in saved else ():
            if there[name] != here.get(name):
                raise UsageError(
                    f"{where} does not match the recipe: it has the state of dl_{split}{name and f'.{name}'} "
                    f"({there[name]}), which is now {here.get(name, 'an object without a state')}."
                )


def check_own_streams(engine: Engine, ranks: Sequence[Mapping[str, Any]], *, within: bool) -> None:
    """Whether streams that shard themselves can be resumed on another number of ranks: at an epoch's start, stateless.

    Raises:
        UsageError: they cannot.
    """
    if len(ranks) == engine.world.size:
        return
    for split, loader in loaders_of(engine).items():
        stateful = any(rank.get("sources", {}).get(split) for rank in ranks)
        if loader.own and (stateful or (within and split == "train")):
            why = "each rank's part of it has a state" if stateful else "the checkpoint is within an epoch"
            raise UsageError(
                f"the run had {len(ranks)} ranks and now has {engine.world.size}, and the {split} loader shards itself "
                f"by rank: {why}. Start {len(ranks)} ranks."
            )
    if any(rank.get("place") is not None and rank["place"]["state"] is not None for rank in ranks):
        logger.info("the train stream is read from the epoch's beginning: the run had another number of ranks")


def _own(saved: State) -> bool:
    return plain_generator(saved["state"]) is None


def check_keepable(engine: Engine) -> None:
    """Looks, before the first step, for what the first checkpoint could not hold; from now on the states are noted.

    Raises:
        UsageError, CheckpointError: something has a state that a checkpoint cannot hold; it is named.
    """
    module = engine.task.module
    try:
        for split, source in sources_of(engine).items():
            source.check(split)
            source.kept = True
            for name, state in source.states().items():
                flatten(state["state"], f"dl_{split}{name and f'.{name}'}: state")
        check_extra(module)
        state = module.state_dict()
        check_storable({n: value for n, value in state.items() if isinstance(value, Tensor)}, "the net's ")
        for name, other in engine.task.others.items():
            flatten(other.state_dict(), name)
    except DtrainError as error:
        error.on_all_ranks = True  # the ranks' objects are alike
        raise


class UnsavedState:
    """Plain numbers that no checkpoint has: attributes of the net, its modules, optimizers and datasets, and globals.

    Args:
        engine: it has not trained yet, or was put to where a run was.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        code = engine.task.code
        self._modules = [] if code is None else modules_of(code.places.values())
        self._before = self._numbers()
        self._told = not engine.world.is_main

    def warn(self) -> None:
        """Tells once of those that training has changed."""
        if self._told:
            return
        now = self._numbers()
        changed = [name for name, value in now.items() if name in self._before and self._before[name] != value]
        if changed:
            self._told = True
            logger.warning(
                "%s%s changed in training and %s not in checkpoints, so a resumed run starts with the initial value. "
                "If results depend on it, make it a buffer (register_buffer), or return it from "
                "get_extra_state(); keep an optimizer's in its param_groups, and make a random generator an attribute "
                "of the model.",
                ", ".join(changed[:5]),
                ", ..." * (len(changed) > 5),
                "is" if len(changed) == 1 else "are",
            )

    def _numbers(self) -> dict[str, float]:
        task = self._engine.task
        found = quantities_of(task.module)
        for number, one in enumerate(self._engine.learner.optimizers()):
            if type(one).__module__.partition(".")[0] != "torch":  # torch's own keep theirs in state_dict()
                name = f"optimizer {number + 1}" if number else "optimizer"
                found |= {f"{name}.{key}": value for key, value in numbers_in(vars(one)).items()}
        for module in self._modules:
            name = module.__name__.removeprefix(UNIMPORTABLE)
            found |= {f"{name}.{key}": value for key, value in numbers_in(vars(module)).items()}
            found |= {f"{name}.{key}": value for key, value in self._global_streams(module).items()}
        for split, source in sources_of(self._engine).items():
            for name, part in parts_of(source.loader).items():
                # Those that are told of epochs count them, and those with a state are kept.
                if isinstance(part, Dataset) and not (hasattr(part, "set_epoch") or hasattr(part, "state_dict")):
                    found |= {f"dl_{split}.{name}.{key}": value for key, value in numbers_in(vars(part)).items()}
        return found

    def _global_streams(self, module: ModuleType) -> dict[str, float]:
        """Returns a checksum of each random generator that is a file's global, and not one of those that are kept."""
        loaders = [part for source in sources_of(self._engine).values() for part in parts_of(source.loader).values()]
        kept = [value for part in loaders for value in getattr(part, "__dict__", {}).values()]
        kept += [*self._engine.generators(), *streams_of(self._engine.task.module).values()]
        known = {id(one) for one in kept}
        values = list(vars(module).items())
        streams = {name: plain_generator(value) for name, value in values if id(value) not in known}
        return {name: _checksum(state[-1]) for name, state in streams.items() if state is not None}


def _checksum(state: Any) -> float:
    """A number that differs where states of a generator do; a long tensor's text would be cut short."""
    return float(zlib.crc32(state.numpy().tobytes() if isinstance(state, Tensor) else repr(state).encode()))
