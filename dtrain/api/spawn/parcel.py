"""A call and all that it leads to, by value, in a file for other processes of this machine.

cloudpickle takes functions and classes of a notebook, a script or a prompt along, so that the ranks need not run it
again; what comes from an importable module is imported there. Everything is in one pickle, so that an optimizer still
holds its net's own parameters.
"""

from __future__ import annotations

import copyreg
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import cloudpickle
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dtrain.api.spawn.culprit import find_culprit
from dtrain.api.spawn.results import changes
from dtrain.api.spawn.surroundings import Surroundings
from dtrain.errors import UsageError

SYS_PATH = "sys_path.json"
_PARCEL = "call.pt"


def write_parcel(folder: Path, function: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Any]:
    """Writes a call for `read_parcel`.

    Returns:
        the objects on the way whose state training changes, in an order that the reader finds too.

    Raises:
        UsageError: something on the way cannot be pickled, or the file cannot be written; it is named.
    """
    changing: list[Any] = []
    # A tuple is pickled in order: by the time of its last part, that list is complete.
    call = (Surroundings.here(), function, dict(arguments), changing)
    pickler = _pickler(changing)
    try:
        (folder / SYS_PATH).write_text(json.dumps([p for p in sys.path if isinstance(p, str)]), encoding="utf-8")
        torch.save(
            call,
            folder / _PARCEL,
            pickle_module=SimpleNamespace(Pickler=pickler, __name__=cloudpickle.__name__),
            pickle_protocol=cloudpickle.DEFAULT_PROTOCOL,
        )
    except Exception as error:  # noqa: BLE001 - pickling runs the user's own code, which may raise anything
        culprit = find_culprit(arguments, _pickler([]))
        raise UsageError(culprit or f"the call could not be written to {folder} for the ranks: {error}") from None
    return changing


def read_parcel(folder: Path) -> tuple[Callable[..., Any], dict[str, Any], list[Any]]:
    """Reads what `write_parcel` wrote into a folder of this user's own: the function, its arguments, and what changes.

    Tensors are mapped from the file, so that the ranks share the memory of a data set that they only read.

    Raises:
        UsageError: a module of the caller's is not found here, or is not as it was there.
    """
    try:
        # Runs code, as it must to bring functions: the file is the parent process's own.
        parcel = torch.load(folder / _PARCEL, map_location="cpu", weights_only=False, mmap=True)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the ranks cannot find what the call needs: {error}. They import modules from your sys.path: add "
            "the module's folder to it, and reload the module if its file has changed."
        ) from error
    surroundings, function, arguments, changing = parcel
    surroundings.restore()
    return function, arguments, changing


def _pickler(changing: list[Any]) -> type[cloudpickle.Pickler]:
    """Returns a pickler that notes on its way what training changes."""

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, thing: Any) -> Any:
            if changes(thing):
                changing.append(thing)
            reduced = _reduced(thing)
            return super().reducer_override(thing) if reduced is None else reduced

    return Pickler


def _reduced(thing: Any) -> Any:
    """How to pickle what would else lose something, or cannot be pickled although nothing is lost."""
    if isinstance(thing, CodeType):  # newer cloudpickles drop the file, by which a traceback finds its lines
        make, parts = cloudpickle.Pickler.dispatch_table[CodeType](thing)[:2]
        return make, tuple(thing.co_filename if part == "<dynamic-code>" else part for part in parts)
    if isinstance(thing, Optimizer):
        # torch's own way drops what a subclass keeps (LBFGS its parameters); "step" is a scheduler's wrapper.
        state = {name: value for name, value in vars(thing).items() if name != "step"}
    elif isinstance(thing, DataLoader) and thing._iterator is not None:
        state = {**vars(thing), "_iterator": None}  # of a loop that has begun, with processes behind it
    else:
        return None
    return copyreg.__newobj__, (type(thing),), state  # type: ignore[attr-defined]
