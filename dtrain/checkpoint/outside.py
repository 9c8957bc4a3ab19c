"""Weights from elsewhere: of another run, of a safetensors file, or of a state dict that torch has saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint.chosen import checkpoints_of, choose_checkpoint
from dtrain.checkpoint.extra import extra_of
from dtrain.checkpoint.folder import MANIFEST, read_manifest, verify_file
from dtrain.checkpoint.left_out import left_out_of
from dtrain.checkpoint.tensors import read_file
from dtrain.checkpoint.weights import WEIGHTS, base_in_run
from dtrain.config.saved import load_run_settings
from dtrain.errors import CheckpointError, UsageError
from dtrain.layout import CONFIG, checkpoint_place, checkpoints_in

_SAVED_BY_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_WITHIN = ("state_dict", "model_state_dict", "model")  # where training scripts keep the net among other things


@dataclass(frozen=True)
class OutsideWeights:
    """What a source has.

    Attributes:
        where: the file that was read, in words of a path.
        values: name -> tensor, or a module's extra state.
        left_out: name -> hash of what a checkpoint lacks on purpose; see `dtrain.checkpoint.left_out`.
    """

    where: str
    values: dict[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_outside(path: Path) -> OutsideWeights:
    """Reads the weights of a run (its best epoch's), a checkpoint's, or a file's; nothing in it can run code.

    Args:
        path: a run's folder, a checkpoint's, or a file: .safetensors, or .pt, .pth, .bin, .ckpt with a state dict.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if path.is_dir():
        return _of_checkpoint(_checkpoint(path))
    if not path.is_file():
        raise UsageError(f"{path}: no such file or run. Name a run's folder, or a .safetensors or .pt file.")
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix in _SAVED_BY_TORCH:
        return _of_torch(path)
    raise UsageError(f"{path}: should be a run's folder, a .safetensors file, or a {', '.join(_SAVED_BY_TORCH)} file.")


def _checkpoint(path: Path) -> Path:
    if checkpoint_place(path.name) is not None and (path / MANIFEST).is_file():
        return path
    if (path / CONFIG).exists():
        return choose_checkpoint(path, "best", load_run_settings(path, []).config.checkpoint).path
    if checkpoints_in(checkpoints_of(path)):
        return choose_checkpoint(path, "best").path
    raise UsageError(f"{path} is neither a run's folder nor a checkpoint. Name one, or a .safetensors or .pt file.")


def _of_checkpoint(path: Path) -> OutsideWeights:
    file = path / WEIGHTS
    try:
        verify_file(file, read_manifest(path)["files"][WEIGHTS])
    except (KeyError, CheckpointError) as error:
        raise UsageError(f"{file}: cannot read the weights: {error}. Use another checkpoint.") from None
    found = _of_safetensors(file)
    try:
        base = base_in_run(path, found.left_out)
    except (OSError, KeyError, CheckpointError) as error:
        raise UsageError(f"the weights that the run of {path} began with cannot be read: {error}.") from None
    rest = {name: digest for name, digest in found.left_out.items() if name not in base}
    return OutsideWeights(found.where, found.values | base, rest)


def _of_safetensors(file: Path) -> OutsideWeights:
    try:
        tensors, metadata = read_file(file)
        return OutsideWeights(str(file), tensors | extra_of(metadata), left_out_of(metadata))
    except (OSError, CheckpointError) as error:
        raise UsageError(f"{file}: cannot read the weights: {error}.") from None


def _of_torch(file: Path) -> OutsideWeights:
    """Reads what `torch.save` wrote: tensors and plain values alone, so that nothing of it is run."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds, all of which are told
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{file}: cannot be read with weights_only=True: {why[0]} Save the state dict alone: "
            "torch.save(model.state_dict(), FILE)."
        ) from None
    if _is_state(saved):
        return OutsideWeights(str(file), dict(saved))
    named = [name for name in _WITHIN if isinstance(saved, Mapping) and _is_state(saved.get(name))]
    if len(named) != 1:
        has = f"is a {type(saved).__name__}"
        if isinstance(saved, Mapping):
            has = f"has {', '.join(map(str, list(saved)[:8]))}"
        raise UsageError(
            f"{file} {has}, and no state dict of one model. Save that alone: torch.save(model.state_dict(), FILE)."
        )
    return OutsideWeights(f"{file} ({named[0]})", dict(saved[named[0]]))


def _is_state(value: Any) -> bool:
    """Whether something is a net's state: text -> tensors, and extra states, whatever they are."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return False
    return all(isinstance(one, Tensor) or name.endswith("_extra_state") for name, one in value.items())
