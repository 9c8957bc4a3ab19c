"""Checkpoints without the weights that are not trained (`checkpoint.weights=trained`): adapters without their base.

What is left out comes from the recipe's `build_model` again. The file of weights has a hash of each such tensor, so
that a base that is no longer the same is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import CheckpointError, UsageError

LEFT_OUT = "dtrain.left_out"  # the metadata's key: JSON, name -> hash
_PIECE = 1 << 24  # elements
_Version = tuple[int, int]


class LeftOut:
    """The weights of a net that its checkpoints lack, for as long as training does not change them.

    Args:
        module: the net, before it trains.
        known: names that are kept in any case: those that training may have changed already, or will.
    """

    def __init__(self, module: nn.Module, known: Collection[str]) -> None:
        own = module.state_dict(keep_vars=True)
        self._module = module
        self._hashes = {n: digest_of(own[n]) for n in own if isinstance(own[n], Tensor) and n not in known}
        self._versions = {name: _version(own[name]) for name in self._hashes}

    def split(self, weights: Mapping[str, Tensor], *, whole: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the weights that a checkpoint keeps, and the metadata that tells of the others.

        Args:
            weights: all, by name.
            whole: whether all others are compared with what they were, and not only those that torch knows to have
                been written to.
        """
        own = self._module.state_dict(keep_vars=True)
        for name in [*self._hashes]:
            value, before = own.get(name), self._versions[name]
            written = value is None or whole or _version(value) != before
            if value is None or value.requires_grad or (written and digest_of(value) != self._hashes[name]):
                del self._hashes[name]  # from now on it is kept
            else:
                self._versions[name] = _version(value)
        kept = {name: value for name, value in weights.items() if name not in self._hashes}
        return kept, {LEFT_OUT: json.dumps(self._hashes)} if self._hashes else {}


def known_names(module: nn.Module, learns: Mapping[str, bool], in_eval: Collection[str]) -> set[str]:
    """Returns the names of a net's state that training may change.

    Args:
        module: the net.
        learns: name of each parameter -> whether it learnt at the beginning.
        in_eval: names of the modules that are in eval mode while the net trains.
    """
    first = {id(parameter): name for name, parameter in module.named_parameters()}  # of the names that tied ones have
    modules = dict(module.named_modules(remove_duplicate=False))
    found = set()
    for name, value in module.state_dict(keep_vars=True).items():
        owner = name.rpartition(".")[0]
        if isinstance(value, nn.Parameter):
            trains = value.requires_grad or learns.get(first.get(id(value), name), True)
        else:  # a buffer: of a module that trains
            own = modules[owner].parameters(recurse=False) if owner in modules else ()
            trains = owner not in in_eval or any(parameter.requires_grad for parameter in own)
        if trains:
            found.add(name)
    return found


def _version(value: Tensor) -> _Version:
    return value._version, value.data_ptr()


@torch.no_grad()
def digest_of(value: Tensor) -> str:
    """Returns a hash of a tensor's type, shape and bytes, wherever it is."""
    digest = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=16)
    flat = value.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].to("cpu").contiguous()
        digest.update(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def left_out_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns name -> hash of what a file of weights lacks.

    Raises:
        CheckpointError: the metadata is nothing of the kind.
    """
    try:
        found = json.loads(metadata.get(LEFT_OUT, "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError("a checkpoint's list of the weights that it lacks cannot be read")
    return found


def changed(module: nn.Module, left_out: Mapping[str, str]) -> list[str]:
    """Returns the names of what a file lacks, and what the net does not have as it was."""
    if not left_out:
        return []
    own: dict[str, Any] = module.state_dict()
    return [
        name
        for name, digest in left_out.items()
        if not isinstance(own.get(name), Tensor) or digest_of(own[name]) != digest
    ]


def check_base(module: nn.Module, left_out: Mapping[str, str], file: str) -> None:
    """Compares the weights that a file lacks with those of the net, which come from its builder.

    Raises:
        UsageError: they are not what they were; the first one is named.
    """
    names = changed(module, left_out)
    if names:
        raise UsageError(
            f"{file} has the trained weights alone (checkpoint.weights=trained), and the others come from build_model, "
            f"where {len(names)} of {len(left_out)} are not what they were: {names[0]}. Build the model with the same "
            "base (its file, its seed), or train with checkpoint.weights=all."
        )
