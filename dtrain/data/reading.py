"""Reads a few samples of a dataset so that nothing of it changes: no random stream, counter or open file.

Where that is not known to hold, nothing is read.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import io
import random
import time
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, GeneratorType, MethodType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from dtrain.data.sources import parts_of
from dtrain.distributed.seeding import CommonRandomness
from dtrain.provenance.loading import is_installed

T = TypeVar("T")

_SECONDS = 0.03  # for one reading of all samples of a loader; where the first one takes longer, none is compared
_FEW = 2  # samples of an iterable
_MOST_OBJECTS = 500
_MOST_ITEMS = 100_000
_STREAMS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_HELD = (*_STREAMS, io.IOBase, GeneratorType, Iterator)
_SIMPLE = (TensorDataset, Subset, ConcatDataset)
_STORES = ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR")
_READERS = ("__getitem__", "__getitems__", "__iter__", "__len__", "__call__", "forward")


def read_some(loader: Any, count: int, seed: int) -> dict[str, list[Any]]:
    """Reads the first, the last and some other samples, each twice, with random numbers that differ.

    Args:
        loader: the user's: a DataLoader, or a list of batches, which count as its samples.
        count: how many at most.
        seed: chooses them.

    Returns:
        the index of a sample, as text -> the two readings of it; empty where it cannot be read without a trace.
    """
    data: Any = loader.dataset if isinstance(loader, DataLoader) else loader
    if not (isinstance(loader, DataLoader) or type(data) in (list, tuple)) or not is_passive(data):
        return {}
    before = _attributes(data)
    found: dict[str, list[Any]] = {}
    try:
        with contextlib.suppress(Exception):  # a dataset that wants something set before, or to be in a worker
            if isinstance(data, IterableDataset):
                found = _first_of(data, seed)
            else:
                found = _chosen_of(data, _indices(len(data), count, seed), seed)
    finally:
        changed = _restored(before)
    return {} if changed else found


def read_again(loader: Any, index: str, times: int) -> list[Any]:
    """Reads a sample several times more, each with other random numbers."""
    data = loader.dataset if isinstance(loader, DataLoader) else loader
    return [_drawn(lambda: data[int(index)], seed) for seed in range(100, 100 + times)]


def _chosen_of(data: Any, indices: list[int], seed: int) -> dict[str, list[Any]]:
    """The samples of some indices; so many of the first ones as the time allows."""

    def some(wanted: list[int]) -> list[Any]:
        started = time.perf_counter()
        samples: list[Any] = []
        for index in wanted:
            samples.append(data[index])
            if time.perf_counter() - started > _SECONDS:
                return samples[:-1]
        return samples

    first = _drawn(lambda: some(indices), seed)
    second = _drawn(lambda: some(indices[: len(first)]), seed + 1)
    return {str(index): [one, two] for index, one, two in zip(indices, first, second, strict=False)}


def _first_of(data: Any, seed: int) -> dict[str, list[Any]]:
    """The first samples of an iterable, whose iteration is begun twice and closed."""

    def some(wanted: int) -> list[Any]:
        started = time.perf_counter()
        samples: list[Any] = []
        iterator = iter(data)
        while len(samples) < wanted:
            samples.append(next(iterator))
            if time.perf_counter() - started > _SECONDS:
                del samples[-1]
                break
        if hasattr(iterator, "close"):
            iterator.close()
        return samples

    first = _drawn(lambda: some(_FEW), seed)
    second = _drawn(lambda: some(len(first)), seed + 1) if first else []
    return {str(index): [one, two] for index, (one, two) in enumerate(zip(first, second, strict=False))}


def _drawn(read: Callable[[], T], seed: int) -> T:
    with CommonRandomness(seed)(), torch.no_grad():
        return read()


def _indices(length: int, count: int, seed: int) -> list[int]:
    inner = range(1, length - 1)
    chosen = random.Random(seed).sample(inner, min(len(inner), count - 2))  # noqa: S311 - a choice, not a secret
    return list(dict.fromkeys([0, length - 1, *chosen])) if length else []


def is_passive(data: Any) -> bool:
    """Whether reading a dataset is known to change nothing: neither itself, nor a random stream of its own.

    Datasets that keep a state, hold a generator or an open file, or assign to attributes, globals or items as they
    are read are not.
    """
    if any(hasattr(part, name) for part in parts_of(data).values() for name in ("state_dict", "load_state_dict")):
        return False
    left, seen = [data], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (Tensor, np.ndarray, str, bytes, int, float, type(None))):
            continue
        seen.add(id(one))
        if len(seen) > _MOST_OBJECTS or isinstance(one, _HELD) or (_is_plain_code(one) is False):
            return False
        left += _inner(one)
    return True


def _inner(one: Any) -> list[Any]:
    if isinstance(one, Mapping):
        return list(one.values())[:16]
    if isinstance(one, (list, tuple, set, frozenset)):
        return list(one)[:16]
    if isinstance(one, MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, FunctionType):
        cells = [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
        return [*cells, *(one.__defaults__ or ())]
    return list(getattr(one, "__dict__", {}).values()) if not isinstance(one, type) else []


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_plain_code(one: Any) -> bool:
    """Whether the functions that read a dataset, or that it holds, assign to nothing but their own variables."""
    if isinstance(one, FunctionType):
        return _assigns_nothing(one, None, set())
    kind = type(one)
    if kind in _SIMPLE or kind.__module__.partition(".")[0] in ("builtins", "torch", "torchvision", "collections"):
        return True
    functions = [getattr(kind, name, None) for name in _READERS]
    return all(_assigns_nothing(f, kind, set()) for f in functions if isinstance(f, FunctionType))


def _assigns_nothing(function: FunctionType, kind: type | None, seen: set[Any]) -> bool:
    code = function.__code__
    if code in seen:
        return True
    seen.add(code)
    for part in _codes(code):
        if any(step.opname in _STORES for step in dis.get_instructions(part)):
            return False
        for name in part.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, _HELD) and not isinstance(value, type):
                return False
            called = value if isinstance(value, FunctionType) else getattr(kind, name, None)
            if not isinstance(called, FunctionType) or is_installed(called.__code__.co_filename):
                continue
            if not _assigns_nothing(called, kind, seen):
                return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _attributes(data: Any) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Returns a dataset's parts with their attributes, and copies of those that are lists, sets and dicts."""
    parts = [part for part in parts_of(data).values() if hasattr(part, "__dict__")]
    return [(part, dict(vars(part)), {n: v.copy() for n, v in vars(part).items() if _is_small(v)}) for part in parts]


def _is_small(value: Any) -> bool:
    return isinstance(value, (list, set, dict)) and len(value) <= _MOST_ITEMS


def _restored(before: list[tuple[Any, dict[str, Any], dict[str, Any]]]) -> bool:
    """Puts attributes back that reading has changed all the same; returns whether there were some."""
    changed = False
    for part, own, copies in before:
        now = vars(part)
        if now.keys() != own.keys() or any(now[name] is not value for name, value in own.items()):
            changed = True
            now.clear()
            now.update(own)
        for name, copied in copies.items():
            if len(own[name]) != len(copied):  # it grew, as a cache does, or a list of what was read
                changed = True
                own[name].clear()
                (own[name].extend if isinstance(copied, list) else own[name].update)(copied)
    return changed
