"""Random generators that a state holds: taken apart to plain values, and made anew in the same state."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_BITS: dict[str, Callable[[], Any]] = {
    "PCG64": np.random.PCG64,
    "PCG64DXSM": np.random.PCG64DXSM,
    "MT19937": np.random.MT19937,
    "Philox": np.random.Philox,
    "SFC64": np.random.SFC64,
}


def plain_generator(value: Any) -> list[Any] | None:
    """Returns a generator's kind and state, of plain values, tensors and arrays; None for anything else."""
    if isinstance(value, torch.Generator):
        return ["torch", value.device.type, value.get_state()]
    if type(value) is np.random.Generator and type(value.bit_generator).__name__ in _BITS:
        return ["numpy", type(value.bit_generator).__name__, dict(value.bit_generator.state)]
    if type(value) is np.random.RandomState:
        return ["legacy", "MT19937", dict(value.get_state(legacy=False))]
    if type(value) is random.Random:
        return ["python", "", value.getstate()]
    return None


def made_generator(parts: list[Any]) -> Any:
    """Returns a new generator with what `plain_generator` returned.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is nothing of the kind.
    """
    kind, which, state = parts
    return _MAKERS[kind](which, state)


def _torch(device: str, state: Any) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _numpy(bits: str, state: Any) -> np.random.Generator:
    made = _BITS[bits]()
    made.state = state
    return np.random.Generator(made)


def _legacy(_: str, state: Any) -> np.random.RandomState:
    made = np.random.RandomState()
    made.set_state(state)
    return made


def _python(_: str, state: Any) -> random.Random:
    made = random.Random()  # noqa: S311 - a stream of the user
    made.setstate(state)
    return made


_MAKERS: dict[str, Callable[[str, Any], Any]] = {
    "torch": _torch,
    "numpy": _numpy,
    "legacy": _legacy,
    "python": _python,
}
