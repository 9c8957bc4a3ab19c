"""The optimizers of a net: found, and with what they keep of its parameters where these are.

An optimizer may have a state before the net comes to its device: Adagrad makes its sums at once, and any other may have
loaded one. Moving the net moves its parameters alone.
"""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def all_optimizers() -> list[Optimizer]:
    """Returns all optimizers of this process, of whatever net."""
    # Not isinstance, which runs the code of whatever there is.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]


def optimizers_holding(ids: Container[int]) -> list[Optimizer]:
    """Returns all optimizers that hold some of the parameters, also those that a train step alone knows.

    Args:
        ids: of the parameters.
    """
    return [
        one
        for one in all_optimizers()
        if any(id(p) in ids for group in getattr(one, "param_groups", ()) for p in group["params"])
    ]


def place_states(net: nn.Module, known: Iterable[Optimizer]) -> None:
    """Moves what optimizers keep of their parameters to where torch needs it, now that the net is on its device.

    Args:
        net: on a device other than the CPU, all optimizers of its parameters are looked for, which takes 0.1 s.
        known: those that are seen to in any case.
    """
    ids = {id(parameter) for parameter in net.parameters()}
    moved = any(parameter.device.type != "cpu" for parameter in net.parameters())
    for optimizer in (*known, *(optimizers_holding(ids) if moved else ())):
        for group in optimizer.param_groups:
            counts_there = bool(group.get("fused") or group.get("capturable"))
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    state = optimizer.state[parameter]
                    state.update(_placed(state, parameter.device, counts_there))


def _placed(value: Any, device: torch.device, counts_there: bool, key: object = None) -> Any:
    """Returns a value as `Optimizer.load_state_dict` places it, but of the type that it has."""
    if isinstance(value, Tensor):
        if key != "step":
            return value.to(device)
        # The count of steps stays where it is, on the CPU as a rule, unless the optimizer's kernels read it.
        return value.to(device, torch.float32) if counts_there else value
    if isinstance(value, dict):
        return {name: _placed(part, device, counts_there, name) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_placed(part, device, counts_there) for part in value)
    return value
