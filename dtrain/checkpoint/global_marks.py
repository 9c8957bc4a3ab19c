"""Marks of the values that a recipe's globals have as a run begins: class weights, a table, a frozen teacher.

The code is compared besides (`dtrain.checkpoint.code`). Where that is the same and a value is not, something that the
code has read is another one: a file, say. Results may not depend on it, so that this is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from dtrain.checkpoint.samples import alike, mark_of
from dtrain.config.recipe_file import UNIMPORTABLE
from dtrain.engine.loop import Engine
from dtrain.masking import masked
from dtrain.model.attributes import modules_of

logger = logging.getLogger(__name__)

GLOBALS = "globals"  # among the marks of a checkpoint's manifest
_MOST_GLOBALS = 500
_MOST_ITEMS = 1_000
_MOST_DEPTH = 4
_MOST_NAMED = 5
_MOST_VALUES = 1 << 10  # of each tensor of a net
_MOMENTS = (1e9, 1e11)  # seconds since 1970: when something began, which is another time at each start
_PLAIN = (bool, int, float, str)


def global_marks(engine: Engine) -> dict[str, Any]:
    """Returns the marks of the globals of a recipe and of the user's own modules that it imports: name -> mark.

    Args:
        engine: it has not trained yet. What its net holds is not looked at, which checkpoints have.
    """
    code = engine.task.code
    net = engine.task.module
    known = {id(part) for part in (*net.modules(), *net.parameters(), *net.buffers())}
    found: dict[str, Any] = {}
    modules = [] if code is None else modules_of(code.places.values())
    owners = [(f"{module.__name__.removeprefix(UNIMPORTABLE)}.", vars(module)) for module in modules]
    for owner, values in [*owners, *([] if code is None else [("", code.values)])]:
        for name, value in list(values.items()):
            if name.startswith("__") or id(value) in known or len(found) >= _MOST_GLOBALS:
                continue
            try:
                mark = _mark(name, value)
            except Exception as error:  # noqa: BLE001 - of an object of the user's, which training may never touch
                logger.info("%s is not compared when the run is resumed: %r", name, error)
                continue
            if mark:
                found[f"{owner}{name}"] = mark
            if not isinstance(value, _PLAIN):  # of which equal ones are one object
                known.add(id(value))  # another module may have imported it
    return found


def warn_of_globals(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compares them with those of a run that is resumed with the same code."""
    other = [name for name, mark in here.items() if name in there and not alike(mark, there[name])]
    if other:
        logger.warning(
            "%s%s %s not what it was when the run began, though the code is the same: something that the code reads, "
            "such as a file, is another one. If results depend on it, bring that back before you go on.",
            ", ".join(other[:_MOST_NAMED]),
            ", ..." * (len(other) > _MOST_NAMED),
            "is" if len(other) == 1 else "are",
        )


def _mark(name: str, value: Any) -> Any:
    """Returns a value's mark; an empty one where it has none, or may be a secret, a place or a moment."""
    if isinstance(value, nn.Module):
        return [[float(norm) for norm in _norms(value)]]
    if isinstance(value, (Tensor, np.ndarray)):
        return mark_of(value)
    flat = list(_flat(name, value, 0))
    return mark_of(flat) if flat and len(flat) <= _MOST_ITEMS and None not in flat else []


def _norms(module: nn.Module) -> Iterator[float]:
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            yield float(flat[:: max(1, flat.numel() // _MOST_VALUES)].double().abs().sum())


def _flat(name: str, value: Any, depth: int) -> Iterator[Any]:
    """Yields the plain values and tensors within nested lists and dicts, with the keys; None for anything else."""
    if (type(value) in _PLAIN and _is_constant(name, value)) or (isinstance(value, (Tensor, np.ndarray)) and depth):
        yield value
    elif type(value) in (list, tuple) and depth < _MOST_DEPTH and len(value) <= _MOST_ITEMS:
        for inner in value:
            yield from _flat(name, inner, depth + 1)
    elif type(value) is dict and depth < _MOST_DEPTH and len(value) <= _MOST_ITEMS:
        for key, inner in value.items():
            yield str(key)
            yield from _flat(str(key), inner, depth + 1)
    else:
        yield None


def _is_constant(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return not any(sign in value for sign in "/\\") and masked(name, value) == value
    return isinstance(value, bool) or not _MOMENTS[0] < abs(value) < _MOMENTS[1]
