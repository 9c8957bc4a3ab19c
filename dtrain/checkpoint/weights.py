"""A net's weights on disk, as safetensors."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoint.folder import name_of, read_manifest, verify_file, write_checkpoint
from dtrain.checkpoint.keeping import Keeping
from dtrain.checkpoint.tensors import pieces
from dtrain.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


def save_epoch(folder: Path, module: nn.Module, row: dict[str, Any], own: Collection[Path] | None = None) -> Path:
    """Saves the weights of an epoch as `folder/epoch-N/`; older ones go only after the new one is there.

    Kept are the last epoch and the best one (lowest `val_loss`, else `loss`).

    Args:
        folder: the run's `checkpoints` folder.
        module: the net itself, not its DDP wrapper.
        row: the epoch's row of the history; it is kept beside the weights.
        own: the epochs' folders that are the run's, of which some may go; None where all in the folder are.

    Returns:
        the new folder, which holds `model.safetensors` and `manifest.json`.
    """
    path = write_checkpoint(folder, name_of(row["epoch"], None), {WEIGHTS: pieces(weights_of(module))}, {"row": row})
    Keeping().prune(folder, None if own is None else {*own, path})
    return path


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
        UsageError: the weights are damaged or another net's; the first parameter that differs is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        verify_file(file, read_manifest(folder)["files"][WEIGHTS])
        saved = load_file(file)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise UsageError(f"{file}: cannot read the weights: {error}.") from None
    check_fit(module, saved, str(file))
    module.load_state_dict(saved, strict=False)  # strict would miss the extra state that is no tensor


def check_fit(module: nn.Module, saved: dict[str, Tensor], file: str) -> None:
    """Compares saved weights with a net.

    Raises:
        UsageError: they are another net's; the first parameter that differs is named.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name in [*own, *(name for name in saved if name not in own)]:
        here = f"shape {tuple(own[name].shape)}" if name in own else "no such parameter"
        there = f"shape {tuple(saved[name].shape)}" if name in saved else "no such parameter"
        if here != there:
            raise UsageError(
                f"{file} does not fit the net: {name} has {there} in the file, and {here} in the recipe's net. "
                "Was the recipe changed, or a model.* value given that the run was not trained with?"
            )
