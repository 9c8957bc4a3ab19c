"""What training changed, brought back into the caller's own objects; the file holds data alone, no code."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.engine.hooks import Callback, has_state
from dtrain.errors import UsageError

_RESULTS = "results.pt"
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)

Row = dict[str, Any]


def changes(thing: Any) -> bool:
    """Whether training changes an object in a way that is to be seen after it.

    That is so for nets, for random generators, for callbacks, and for optimizers, schedulers and the like, which have a
    state and take steps.
    """
    return isinstance(thing, (nn.Module, torch.Generator, Callback)) or all(
        hasattr(type(thing), name) for name in ("state_dict", "load_state_dict", "step")
    )


def check_returnable(changing: list[Any]) -> None:
    """Refuses an optimizer or scheduler whose state is more than numbers and tensors, before anything is trained.

    Raises:
        UsageError: there is one; what its state holds is named.
    """
    for thing in changing:
        _state_of(thing)


def write_results(folder: Path, rows: list[Row], changing: list[Any]) -> None:
    """Writes the rows of the history and the state of each object for `read_results`."""
    torch.save({"rows": _plain(rows, "rows"), "states": [_state_of(thing) for thing in changing]}, folder / _RESULTS)


def read_results(folder: Path, changing: list[Any]) -> list[Row]:
    """Puts what `write_results` wrote into the objects, in place, and returns the rows.

    Args:
        folder: where it was written.
        changing: as many objects, of the same kinds in the same order, as were written.
    """
    saved = torch.load(folder / _RESULTS, map_location="cpu", weights_only=True)
    pairs = zip(changing, saved["states"], strict=True)
    for thing, state in reversed(list(pairs)):  # an optimizer within another one before that
        _put_state(thing, state)
    rows: list[Row] = saved["rows"]
    return rows


def _state_of(thing: Any) -> Any:
    """A module's own part (its children have theirs), a generator's or an optimizer's state."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, nn.Module):
        return {"training": thing.training, "tensors": _own_tensors(thing)}
    if isinstance(thing, Callback) and not has_state(thing):
        return _plain_part(vars(thing))
    return _plain(thing.state_dict(), f"{type(thing).__name__}.state_dict()")


def _put_state(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, nn.Module):
        thing.training = state["training"]
        for name, tensor in state["tensors"].items():
            _put_tensor(thing, name, tensor)
    elif isinstance(thing, Callback) and not has_state(thing):
        vars(thing).update(state)
    else:
        thing.load_state_dict(state)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.detach() for name, tensor in own if not is_lazy(tensor)}


def _put_tensor(module: nn.Module, name: str, new: Tensor) -> None:
    """Overwrites a parameter or buffer with its new value; one of another shape or type gives way to it."""
    old = getattr(module, name)
    if is_lazy(old):
        old.materialize(new.shape)
    if isinstance(old, Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype):
        with torch.no_grad():
            old.copy_(new)
    elif isinstance(old, nn.Parameter):
        old.data = new.to(old.device)
    else:
        setattr(module, name, new)


def _plain_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of an object's attributes that can be read without running code."""
    found = {}
    for name, value in values.items():
        with contextlib.suppress(UsageError):
            found[name] = _plain(value, name)
    return found


def _plain(value: Any, path: str) -> Any:
    """Returns a state with nothing in it but what can be read without running code.

    Raises:
        UsageError: it holds something else.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (Tensor, nn.Parameter):
        return value.detach()
    if type(value) in _SIMPLE:
        return value
    if type(value) in (list, tuple, set):
        return type(value)(_plain(item, f"{path}[{index}]") for index, item in enumerate(value))
    if isinstance(value, Mapping):
        kind: Any = type(value) if type(value) in (OrderedDict, Counter) else dict
        return kind({_plain(key, path): _plain(item, f"{path}[{key!r}]") for key, item in value.items()})
    raise UsageError(
        f"{path} is a {type(value).__name__}, which cannot be returned from the ranks. Give the class a state_dict() "
        "of tensors and numbers, or omit num_processes to train in this process."
    )
