"""Finds what it is that cannot be pickled, and says where it hangs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_REMEDY = (
    "Create it where it is used (in a dataset on the first __getitem__, or within the step), or omit "
    "num_processes to train in this process."
)


def find_culprit(arguments: Mapping[str, Any], pickler: type[Any]) -> str | None:
    """Returns what is to be told of the innermost object that a pickler refuses; None where it takes all.

    Args:
        arguments: name -> what is to be pickled.
        pickler: a class like `pickle.Pickler`.
    """
    seen: set[int] = set()
    refusal: Exception | None = None
    path, culprit = "", None
    children: Iterator[tuple[str, Any]] = iter(arguments.items())
    while found := _first_refused(children, pickler, seen):
        step, culprit, refusal = found
        path += step
        children = _children(culprit)
    if refusal is None:
        return None
    kind = type(culprit)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{path} is a {name}, which cannot be sent to the ranks ({refusal}). {_REMEDY}"


def _first_refused(
    children: Iterator[tuple[str, Any]], pickler: type[Any], seen: set[int]
) -> tuple[str, Any, Exception] | None:
    for step, child in children:
        if id(child) in seen:
            continue
        seen.add(id(child))
        refusal = _refusal(child, pickler)
        if refusal is not None:
            return step, child, refusal
    return None


def _refusal(thing: Any, pickler: type[Any]) -> Exception | None:
    class Dry(pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            return "storage" if torch.is_storage(obj) else None

    try:
        Dry(_Nowhere(), protocol=5, buffer_callback=lambda _: None).dump(thing)
    except Exception as error:  # noqa: BLE001 - pickling runs the user's own code
        return error
    return None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object's pickle holds, each with the words that lead there."""
    if isinstance(thing, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in thing.items())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", value) for index, value in enumerate(thing))
    elif isinstance(thing, FunctionType):
        yield from ((f", through {name}", value) for name, value in _used(thing))
    elif isinstance(thing, MethodType):
        yield ".__self__", thing.__self__
    elif isinstance(thing, functools.partial):
        yield from ((f".{name}", getattr(thing, name)) for name in ("func", "args", "keywords"))
    elif isinstance(thing, type):
        yield from ((f".{name}", value) for name, value in vars(thing).items())
    else:
        yield from _attributes(thing)
        yield f", through its class {type(thing).__qualname__}", type(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, nn.Module):
        yield from ((f"[{name}]" if name.isdigit() else f".{name}", child) for name, child in thing.named_children())
    own = type(thing).__dict__.get("__getstate__")
    state = thing.__getstate__() if own is not None else getattr(thing, "__dict__", {})
    if isinstance(state, Mapping):
        yield from ((f".{name}", value) for name, value in state.items() if name != "_modules")
    for slot in getattr(type(thing), "__slots__", ()):
        if hasattr(thing, slot):
            yield f".{slot}", getattr(thing, slot)


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of other scopes, and the defaults, that a function takes along."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    yield from _defaults(function)


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The default values of a function's parameters, by name."""
    defaults = function.__defaults__ or ()
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function's code mentions, that of the functions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
