"""Activation checkpointing: parts of the net whose forward is computed again in the backward, to save memory.

Of such a part the inputs alone are kept until the backward, which computes the rest anew, with the same random numbers:
torch's `torch.utils.checkpoint`, without its reentrant form. The part's `forward` is led through it, so that names,
attributes, hooks and `state_dict()` stay what they are. Buffers that a forward changes, such as BatchNorm's statistics,
change once: computing it again leaves them as the first time did.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrain.errors import ConfigError, UsageError, nearest

KEY = "train.activation_checkpointing"


def recompute(module: nn.Module, patterns: Iterable[str], place: str) -> list[str]:
    """Has the parts of a net that some pattern matches compute their forward again in the backward.

    Args:
        module: the net.
        patterns: matched against whole names of `named_modules()`, `*` and `?` as in a shell. A part within another
            one that is matched is part of that one. Containers without a forward (ModuleList) are not matched.
        place: where they were given, for messages.

    Returns:
        the names of the parts.

    Raises:
        ConfigError: a pattern matches none.
    """
    parts = {name: part for name, part in module.named_modules() if name and _has_forward(part)}
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in parts if fnmatchcase(name, pattern)}
        if not matched:
            hint = nearest(pattern, list(parts))
            raise ConfigError(f"{KEY} = {pattern!r} ({place}): no module of the model has this name.{hint}")
        found |= matched
    outermost = [name for name in parts if name in found and not any(above in found for above in _above(name))]
    for name in outermost:
        _lead(parts[name])
    return outermost


def refuse_synced_batchnorm(module: nn.Module) -> None:
    """Refuses parts with BatchNorm whose statistics are taken over the ranks: the ranks would meet in the backward.

    Raises:
        UsageError: there is one.
    """
    for name, part in module.named_modules():
        recomputed = getattr(part.__dict__.get("forward"), "recomputes", False)
        if recomputed and any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in part.modules()):
            raise UsageError(
                f"{KEY}: {name} has BatchNorm in it, whose statistics train.sync_batchnorm takes over the ranks, which "
                "cannot be recomputed in the backward pass. Exclude this module, or disable sync_batchnorm."
            )


def _has_forward(part: nn.Module) -> bool:
    return type(part).forward is not nn.Module.forward


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _lead(part: nn.Module) -> None:
    """Leads calls of a part's forward through torch's checkpoint; bound as before, so that a copy has its own."""
    forward = part.forward
    function = getattr(forward, "__func__", None)
    if function is None:  # something of the user's own that stands there
        part.__dict__["forward"] = functools.partial(_led(lambda _, *args, **kwargs: forward(*args, **kwargs)), part)
    else:
        part.__dict__["forward"] = MethodType(_led(function), part)


def _led(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(part, *args, **kwargs)
        how: dict[str, Any] = {"use_reentrant": False}
        # Compiled code changes a buffer once in any case.
        if not torch.compiler.is_compiling() and next(part.buffers(), None) is not None:
            how["context_fn"] = lambda: (contextlib.nullcontext(), _buffers_kept(part))
        return checkpoint(MethodType(function, part), *args, **how, **kwargs)

    forward.recomputes = True  # type: ignore[attr-defined]
    return forward


@contextlib.contextmanager
def _buffers_kept(part: nn.Module) -> Iterator[None]:
    """While inside, the forward may change its buffers; then they are as before."""
    buffers = list(part.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
