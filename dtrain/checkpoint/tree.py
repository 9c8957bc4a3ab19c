"""Any nested state as JSON and tensors, and back: what a `state_dict()` holds, without pickle.

A plain value (None, bool, int, float, str) stands for itself. Everything else is an object with one key that says
what it is: ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"tensor": NAME}``, ... so
that tuples stay tuples and an optimizer's integer keys stay integers. Only these are ever made of what is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint.generators import made_generator, plain_generator
from dtrain.checkpoint.tensors import DTYPES
from dtrain.errors import CheckpointError

_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {"dict": dict, "ordered": OrderedDict}
_KINDS = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", dict: "dict", OrderedDict: "ordered"}

_TO_JSON: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    torch.Size: ("size", list),
    torch.dtype: ("dtype", lambda dtype: str(dtype).removeprefix("torch.")),
    bytes: ("bytes", bytes.hex),
    complex: ("complex", lambda number: [number.real, number.imag]),
}


def flatten(value: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Takes a nested state apart.

    Args:
        value: the state; its tensors are taken as they are, not copied.
        where: what it is, for the tensors' names and for messages.

    Returns:
        what JSON holds, of new lists and dicts alone; and the tensors by the names that stand for them in it.

    Raises:
        CheckpointError: something in it can be represented by neither; it is named.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(value, where, tensors), tensors


def _flatten(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if kind in (dict, OrderedDict):
        pairs = [[_flatten(k, f"{where}/key", tensors), _flatten(v, f"{where}/{k}", tensors)] for k, v in value.items()]
        return {_KINDS[kind]: pairs}
    if kind in _KINDS:
        return {_KINDS[kind]: [_flatten(part, f"{where}/{n}", tensors) for n, part in enumerate(value)]}
    if kind in _TO_JSON:
        tag, plain = _TO_JSON[kind]
        return {tag: plain(value)}
    return _numbers(value, where, tensors)


def _numbers(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return _tensor(value, where, tensors)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return {"array" if isinstance(value, np.ndarray) else "scalar": _array(value, where, tensors)}
    generator = plain_generator(value)
    if generator is not None:
        return {"generator": _flatten(generator, where, tensors)}
    raise CheckpointError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot contain. state_dict() and "
        "get_extra_state() may return numbers, text, tensors, arrays and random "
        "generators, in lists, tuples, sets and dicts."
    )


def _tensor(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if tensor.is_complex():
        return {"complex tensor": _stored(torch.view_as_real(tensor.detach().resolve_conj()), where, tensors)}
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{where} is a tensor of type {tensor.dtype}, layout {tensor.layout}, which a checkpoint cannot contain."
        )
    return {"tensor": _stored(tensor.detach(), where, tensors)}


def _array(value: Any, where: str, tensors: dict[str, Tensor]) -> str:
    array = np.array(value, dtype=value.dtype.newbyteorder("="))  # a copy: the user's may be read-only
    return _stored(torch.from_numpy(array), where, tensors)


def _stored(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> str:
    name, number = where, 1
    while name in tensors:  # the keys 1 and "1" of one dict
        number += 1
        name = f"{where} ({number})"
    tensors[name] = tensor
    return name


def unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Puts together what `flatten` took apart; the tensors are the given ones.

    Raises:
        CheckpointError: the structure is none that `flatten` makes, or a tensor is missing.
    """
    if type(structure) in _PLAIN:
        return structure
    if not isinstance(structure, dict) or len(structure) != 1:
        raise CheckpointError(f"a state contains an unexpected {type(structure).__name__}")
    ((tag, inner),) = structure.items()
    try:
        return _made(tag, inner, tensors)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"a state contains a damaged {tag}: {error!r}") from None


def _made(tag: str, inner: Any, tensors: Mapping[str, Tensor]) -> Any:
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([unflatten(part, tensors) for part in inner])
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]([(unflatten(key, tensors), unflatten(value, tensors)) for key, value in inner])
    if tag == "generator":
        return made_generator(unflatten(inner, tensors))
    if tag in _OF_TENSORS:
        return _OF_TENSORS[tag](tensors[inner])
    return _OF_JSON[tag](inner)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is not a torch dtype")
    return found


_OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda tensor: tensor,
    "complex tensor": torch.view_as_complex,
    "array": lambda tensor: tensor.numpy().copy(),
    "scalar": lambda tensor: tensor.numpy()[()],
}
_OF_JSON: dict[str, Callable[[Any], Any]] = {
    "size": torch.Size,
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "dtype": _dtype,
}
