"""Weights on disk: safetensors, written to a temporary name, synced, then renamed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.history import best_row

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"


def save_epoch(folder: Path, module: nn.Module, row: dict[str, Any]) -> Path:
    """Saves the weights of an epoch as `folder/epoch-N/`; older ones go only after the new one is there.

    Kept are the last epoch and the best one (lowest `val_loss`, else `loss`).

    Args:
        folder: the run's `checkpoints` folder.
        module: the net itself, not its DDP wrapper.
        row: the epoch's row of the history; it is kept beside the weights.

    Returns:
        the new folder, which holds `model.safetensors` and `manifest.json`.
    """
    from safetensors.torch import save_file

    final = folder / f"epoch-{row['epoch']}"
    part = folder / f".{final.name}.part"
    part.mkdir(parents=True)
    try:
        save_file(weights_of(module), part / WEIGHTS)
        (part / MANIFEST).write_text(json.dumps({"row": row}, indent=1), encoding="utf-8")
        for path in (part / WEIGHTS, part / MANIFEST, part):
            _sync(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # a full disk gets its room back
        raise
    part.rename(final)
    _sync(folder)
    _prune(folder, keep=final)
    return final


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a net's state as safetensors can hold it: plain, contiguous, no two sharing memory.

    Tied weights are stored under each of their names, so that `load_state_dict` takes them as they are.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            logger.warning("%s is not saved: it is the extra state of a module, and no tensor", name)
            continue
        tensor = value.detach().to("cpu", memory_format=torch.contiguous_format)
        address = tensor.untyped_storage().data_ptr()
        shared = address in seen or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes()
        seen.add(address)
        state[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return state


def load_weights(module: nn.Module, folder: Path) -> None:
    """Loads the weights of a saved epoch into a net.

    Args:
        module: the net itself; it is left as it is where the weights do not fit.
        folder: what `save_epoch` returned.

    Raises:
        UsageError: the weights are another net's; the first parameter that differs is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file}: cannot read the weights: {error}.") from None
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name in [*own, *(name for name in saved if name not in own)]:
        here = f"shape {tuple(own[name].shape)}" if name in own else "no such parameter"
        there = f"shape {tuple(saved[name].shape)}" if name in saved else "no such parameter"
        if here != there:
            raise UsageError(
                f"{file} does not fit the net: {name} has {there} in the file, and {here} in the recipe's net. "
                "Was the recipe changed, or a model.* value given that the run was not trained with?"
            )
    module.load_state_dict(saved, strict=False)  # strict would miss the extra state that is no tensor


def saved_epochs(folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the epochs that are saved whole, in order, with their rows of the history."""
    found = {
        path.parent: json.loads(path.read_text(encoding="utf-8"))["row"] for path in folder.glob(f"epoch-*/{MANIFEST}")
    }
    return dict(sorted(found.items(), key=lambda item: int(item[1]["epoch"])))


def _prune(folder: Path, keep: Path) -> None:
    saved = saved_epochs(folder)
    best = best_row(list(saved.values()))
    for path, row in saved.items():
        if path != keep and row is not best:
            gone = path.with_name(f".{path.name}.gone")
            path.rename(gone)  # a kill in the midst of the next line leaves nothing that looks like a checkpoint
            shutil.rmtree(gone)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
