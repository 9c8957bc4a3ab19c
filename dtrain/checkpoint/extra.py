"""What a module keeps besides parameters and buffers: `get_extra_state()`, of any kind, in a file of weights.

Tensors lie among the weights, by their names. Anything else is text in the file's metadata: JSON, and the tensors in
it as base64 of a safetensors file. So one file has all that the net's `state_dict()` has.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from dtrain.checkpoint.tensors import pieces, read_tensors
from dtrain.checkpoint.tree import flatten, unflatten
from dtrain.errors import CheckpointError

EXTRA = "dtrain.extra_state"  # the metadata's key


def extra_keys(module: nn.Module) -> set[str]:
    """Returns the keys of a net's `state_dict()` that are some module's extra state."""
    return {
        f"{path}.{_EXTRA_STATE_KEY_SUFFIX}" if path else _EXTRA_STATE_KEY_SUFFIX
        for path, part in module.named_modules(remove_duplicate=False)
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def check_extra(module: nn.Module) -> None:
    """Looks whether a net's extra states can be kept and put back.

    Raises:
        CheckpointError: one cannot; it is named.
    """
    for path, part in module.named_modules():
        kind = type(part)
        if kind.get_extra_state is not nn.Module.get_extra_state and kind.set_extra_state is nn.Module.set_extra_state:
            raise CheckpointError(
                f"model{path and f'.{path}'} ({kind.__name__}) has get_extra_state() but no set_extra_state(state), "
                "so its state cannot be restored. Define both, or neither."
            )
    extra_metadata(module.state_dict())


def extra_metadata(state: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a file's metadata has of a net's `state_dict()`: all that is no tensor.

    Raises:
        CheckpointError: something in it can be represented by neither JSON nor tensors; it is named.
    """
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if not values:
        return {}
    structure, tensors = flatten(values, "the net's state")
    plain = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    packed = base64.b64encode(b"".join(pieces(plain))).decode() if plain else ""
    return {EXTRA: json.dumps({"structure": structure, "tensors": packed})}


def extra_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns what `extra_metadata` took out of a `state_dict()`.

    Raises:
        CheckpointError: the metadata is nothing of the kind.
    """
    if EXTRA not in metadata:
        return {}
    try:
        told = json.loads(metadata[EXTRA])
        tensors = read_tensors(base64.b64decode(told["tensors"]))[0] if told["tensors"] else {}
        values = unflatten(told["structure"], tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"a checkpoint's extra state cannot be read: {error!r}") from None
    if not isinstance(values, dict):
        raise CheckpointError("a checkpoint's extra state is not a dict")
    return values


def placed_like(value: Any, pattern: Any) -> Any:
    """Returns a state with its tensors on the devices that those of a like one, at the same places, are on."""
    if isinstance(value, Tensor):
        return value.to(pattern.device) if isinstance(pattern, Tensor) and value.is_cpu else value
    if isinstance(value, dict) and isinstance(pattern, dict):
        return type(value)((key, placed_like(part, pattern.get(key))) for key, part in value.items())
    if type(value) in (list, tuple) and type(pattern) is type(value) and len(value) == len(pattern):
        return type(value)(placed_like(part, other) for part, other in zip(value, pattern, strict=True))
    return value


@torch.no_grad()
def load_extra(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved state with the extra states where they are now; see `placed_like`."""
    keys = extra_keys(module)
    if not keys:
        return dict(saved)
    own = module.state_dict()
    return {name: placed_like(value, own.get(name)) if name in keys else value for name, value in saved.items()}
