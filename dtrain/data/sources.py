"""What a loader is made of: told of epochs, and its states, from which a run that is resumed draws the same samples.

A loader's parts are itself, its sampler and batch sampler, its dataset, and the samplers and datasets in these, at any
depth. Those that have `set_epoch` are told each epoch before it begins. Of those that have `state_dict` and
`load_state_dict`, and of random generators in samplers, iterables and datasets, the states are kept:

- as they were when the epoch began, since a loader reads ahead: resumed within an epoch, it deals the same order again
  up to where the run was;
- of a map-style dataset also as they are, since a train step may change it.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from dtrain.data.loader_group import LoaderGroup
from dtrain.distributed.seeding import CommonRandomness
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = dict[str, Any]

_PARTS = (Dataset, Sampler, DataLoader)
_INNER = ("dataset", "datasets")  # of whatever type
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
# Their states are places in a pass, which each epoch begins anew, and asking for one may begin it.
_PLACES = ("torchdata.", "datasets.arrow_dataset", "datasets.iterable_dataset")
_SMALL = 2**24  # bytes


def parts_of(thing: Any, name: str = "") -> dict[str, Any]:
    """Returns a loader's or dataset's parts by name, itself first; each object once."""
    found: dict[str, Any] = {}
    _collect(thing, name, found, set())
    return found


def _collect(thing: Any, name: str, found: dict[str, Any], seen: set[int]) -> None:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    found[name] = thing
    for key, part in _inner(thing):
        _collect(part, f"{name}.{key}" if name else key, found, seen)


def _inner(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, LoaderGroup):
        yield from thing.loaders.items()
        return
    if isinstance(thing, DataLoader):
        own = {key: getattr(thing, key) for key in ("dataset", "batch_sampler", "sampler")}  # samplers know the dataset
    else:
        own = getattr(thing, "__dict__", {})
    for key, value in own.items():
        if isinstance(value, _PARTS) or (key in (*_INNER, "batch_sampler", "sampler") and hasattr(value, "__dict__")):
            yield key, value
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], _PARTS):
            yield from ((f"{key}.{number}", part) for number, part in enumerate(value))
        elif isinstance(value, dict) and isinstance(next(iter(value.values()), None), _PARTS):
            yield from ((f"{key}.{inner}", part) for inner, part in value.items())


def enter_epoch(thing: Any, epoch: int) -> None:
    """Tells the parts of a loader or dataset which epoch begins: inner ones first, since an outer one may know better.

    Args:
        thing: the loader or dataset.
        epoch: from 1; they count from 0.
    """
    for part in reversed(parts_of(thing).values()):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch - 1)


def knows_epochs(thing: Any) -> bool:
    """Whether a part of a loader or dataset is told of epochs."""
    return any(callable(getattr(part, "set_epoch", None)) for part in parts_of(thing).values())


class Sources:
    """The parts of a loader in this process.

    Args:
        loader: the user's.
        same: whether every epoch is to be as the first one.

    Attributes:
        kept: whether somebody keeps the states.
        began: what `states` returned as the epoch began; empty where nobody keeps it.
    """

    def __init__(self, loader: Any, *, same: bool = False) -> None:
        self.loader = loader
        self._same = same
        self._first: dict[str, State] | None = None
        self.kept = False
        self.began: dict[str, State] = {}
        self._entered: int | None = None
        self._loaded = False

    def enter(self, epoch: int) -> None:
        """An epoch begins: the states are noted, and the parts told of the epoch."""
        if self._same:
            if self._first is not None:
                self.load(self._first)
            self._first = self.states()
        if self.kept:
            self.began = self.states()
        enter_epoch(self.loader, 1 if self._same else epoch)
        self._entered = epoch

    def begin(self, epoch: int) -> None:
        """A pass begins; enters its epoch where that was not done for this pass."""
        entered, self._entered = self._entered, None
        if entered != epoch:
            self.enter(epoch)
            self._entered = None

    def replay(self, epoch: int) -> None:
        """Tells the parts of an epoch that a run had before it was resumed: a dataset may change with each call."""
        if knows_epochs(self.loader):
            with CommonRandomness(0)():  # what is drawn here is drawn from nobody's stream
                enter_epoch(self.loader, 1 if self._same else epoch)

    def over_epochs(self, epochs: int, ask: Callable[[], T]) -> list[T]:
        """Returns what a question comes to in each epoch, asked ahead; the parts are then as they were.

        Args:
            epochs: how many, from the first.
            ask: is called with the parts told of each epoch in turn; once, where none is told of epochs.
        """
        if not knows_epochs(self.loader):
            return [ask()] * epochs
        parts = [part for part in parts_of(self.loader).values() if hasattr(part, "__dict__")]
        before = [dict(vars(part)) for part in parts]
        undo = [_undo(value) for own in before for value in own.values()]
        answers = []
        try:
            with CommonRandomness(0)():  # what is drawn here is drawn from nobody's stream
                for epoch in range(1, epochs + 1):
                    enter_epoch(self.loader, epoch)
                    answers.append(ask())
        finally:
            for part, own in zip(parts, before, strict=True):
                vars(part).clear()
                vars(part).update(own)
            for put_back in filter(None, undo):
                put_back()
        return answers

    def stateful(self) -> dict[str, Any]:
        """Returns, by name, the parts that have a state: themselves, and random generators among their attributes."""
        return _stateful(parts_of(self.loader))

    def states(self, *, datasets: bool = False) -> dict[str, State]:
        """Returns copies of the parts' states by name.

        Args:
            datasets: of map-style datasets alone.
        """
        return {
            name: {"kind": type(part).__qualname__, "state": _state_of(part)}
            for name, part in self.stateful().items()
            if not datasets or _is_of(name, self._map_style())
        }

    def after_epoch(self) -> dict[str, State]:
        """Returns the states with which the next epoch begins."""
        return self.states() if self._first is None else self._first

    def load(self, states: Mapping[str, State]) -> None:
        """Puts back what `states` returned."""
        for name, saved in states.items():  # an object before the generators in it, which it may have made anew
            part = self.stateful().get(name)
            if part is not None:
                load_state(part, copy.deepcopy(saved["state"]))
        self._loaded = self._loaded or bool(states)

    def rewind(self) -> None:
        """Puts the datasets back to where they were when the epoch began."""
        self.load({name: saved for name, saved in self.began.items() if _is_of(name, self._map_style())})

    def restarting(self, source: Iterable[Any]) -> Iterable[Any]:
        """Returns an iterable that begins anew where its state was put back and is that of a pass's end."""
        loaded, self._loaded = self._loaded, False
        return _twice(source) if loaded else source

    def placed(self, *, at_end: bool) -> None:
        """A loader's state was put back besides: within a pass, from which it goes on, or that of its end."""
        self._loaded = at_end

    @property
    def replays(self) -> bool:
        """Whether a resumed epoch reads what was read before: its workers have copies of a dataset with a state."""
        return bool(getattr(self.loader, "num_workers", 0)) and bool(_stateful(self._map_style()))

    def check(self, split: str) -> None:
        """Looks for a state that cannot be had: that of a dataset in workers that live on; of a generator, it is told.

        Raises:
            UsageError: an object has one; it is named.
        """
        dataset = getattr(self.loader, "dataset", None)
        if not (getattr(self.loader, "num_workers", 0) and getattr(self.loader, "persistent_workers", False)):
            return
        if isinstance(dataset, IterableDataset) and knows_epochs(dataset):
            return  # its workers begin each epoch anew
        for name, part in _stateful(parts_of(dataset, f"dl_{split}.dataset")).items():
            is_stream = type(part) in _GENERATORS
            what = "is a random generator" if is_stream else "has a state (state_dict, load_state_dict)"
            text = (
                f"{name} ({type(part).__qualname__}) {what}, of which each of the loader's persistent workers has a "
                "copy that no checkpoint can contain. Use persistent_workers=False in the DataLoader"
            )
            if not is_stream:
                raise UsageError(f"{text}, or give the dataset set_epoch(epoch) in place of a state.")
            logger.warning("%s, or draw from torch's, NumPy's or Python's global stream.", text)

    def _map_style(self) -> dict[str, Any]:
        dataset = getattr(self.loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset):
            return {}
        return {n: part for n, part in parts_of(dataset, "dataset").items() if not isinstance(part, Sampler)}


def _undo(value: Any) -> Callable[[], object] | None:
    """Returns what puts a part's attribute back to what it is, where it may be changed in place; not a large tensor."""
    kind = type(value)
    if kind is list:
        return functools.partial(value.__setitem__, slice(None), value.copy())
    if kind in (dict, set, deque):
        return functools.partial(_refill, value, value.copy())
    if kind in _GENERATORS:
        return functools.partial(load_state, value, copy.deepcopy(value))
    if kind is Tensor and value.layout is torch.strided and not value.is_nested and value.nbytes <= _SMALL:
        return functools.partial(value.detach().copy_, value.detach().clone())
    if kind is np.ndarray and value.flags.writeable and value.nbytes <= _SMALL:
        return functools.partial(np.copyto, value, value.copy())
    return None


def _refill(value: Any, items: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, deque) else value.update)(items)


def _stateful(parts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if _has_state(part):
            found[name] = part
        for key, value in getattr(part, "__dict__", {}).items():
            if type(value) in _GENERATORS:
                found[f"{name}.{key}" if name else key] = value
    return found


def _is_of(name: str, parts: Mapping[str, Any]) -> bool:
    return name in parts or name.rpartition(".")[0] in parts


def _has_state(part: Any) -> bool:
    if type(part).__module__.startswith(_PLACES) or isinstance(part, type):
        return False
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def _state_of(part: Any) -> Any:
    state = part if type(part) in _GENERATORS else part.state_dict()
    try:
        return copy.deepcopy(state)
    except (TypeError, RuntimeError, NotImplementedError, copy.Error):
        return state  # what cannot be copied cannot be saved, which is told by its name where it is due


def load_state(part: Any, state: Any) -> None:
    """Puts a state back into an object that has one, or into a random generator."""
    if isinstance(part, torch.Generator):
        part.set_state(state.get_state())
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state.bit_generator.state
    elif isinstance(part, np.random.RandomState):
        part.set_state(state.get_state(legacy=False))
    elif isinstance(part, random.Random):
        part.setstate(state.getstate())
    else:
        part.load_state_dict(state)


def _twice(source: Iterable[Any]) -> Iterator[Any]:
    """Iterates; where there is nothing, once more."""
    end = object()
    iterator = iter(source)
    first: Any = next(iterator, end)
    if first is end:
        iterator = iter(source)
    else:
        yield first
    yield from iterator
