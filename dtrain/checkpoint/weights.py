"""A net's weights on disk, as safetensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoint.extra import extra_keys, extra_metadata, extra_of, load_extra
from dtrain.checkpoint.folder import Pieces, read_manifest, verify_file, write_checkpoint
from dtrain.checkpoint.left_out import check_base, digest_of, left_out_of
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.checkpoint.tensors import pieces, read_file
from dtrain.errors import CheckpointError, UsageError
from dtrain.layout import INITIAL, checkpoint_name

WEIGHTS = "model.safetensors"
INITIAL_NAME = "weights"  # of the one checkpoint in a run's folder `INITIAL`
NOTHING_LEFT_OUT: Mapping[str, str] = {}


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
    path = write_checkpoint(folder, checkpoint_name(row["epoch"], None), {WEIGHTS: weights_file(module)}, {"row": row})
    RetentionPolicy().prune(folder, None if own is None else {*own, path})
    return path


def weights_file(module: nn.Module) -> Pieces:
    """Returns a safetensors file of a net's state, its modules' extra states included, in pieces.

    Raises:
        CheckpointError: something of it cannot be held; it is named.
    """
    return pieces(weights_of(module), extra_metadata(module.state_dict()))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a net's state as safetensors can hold it: plain, contiguous, no two sharing memory.

    Tied weights are stored under each of their names, so that `load_state_dict` takes them as they are.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            continue  # see `extra_metadata`
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
    file = folder / WEIGHTS
    try:
        verify_file(file, read_manifest(folder)["files"][WEIGHTS])
        tensors, metadata = read_file(file)
        saved, left_out = tensors | extra_of(metadata), left_out_of(metadata)
        base = base_in_run(folder, left_out)
    except (OSError, KeyError, CheckpointError) as error:
        raise UsageError(f"{file}: cannot read the weights: {error}.") from None
    saved, lacks = saved | base, {name: digest for name, digest in left_out.items() if name not in base}
    check_fit(module, saved, str(file), lacks)
    module.load_state_dict(load_extra(module, saved), strict=False)


def base_in_run(folder: Path, left_out: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns those of the weights that a checkpoint lacks which its run began with (`train.init_from`), by name.

    Args:
        folder: the checkpoint, where it was saved.
        left_out: name -> hash of what it lacks.

    Raises:
        OSError, CheckpointError: they cannot be read.
    """
    kept = folder.absolute().parent.parent / INITIAL / INITIAL_NAME
    if not left_out or not kept.is_dir():
        return {}
    verify_file(kept / WEIGHTS, read_manifest(kept)["files"][WEIGHTS])
    values = read_file(kept / WEIGHTS)[0]
    return {name: values[name] for name in left_out if name in values and digest_of(values[name]) == left_out[name]}


def check_fit(
    module: nn.Module, saved: Mapping[str, Any], file: str, left_out: Mapping[str, str] = NOTHING_LEFT_OUT
) -> None:
    """Compares a saved state with a net. An extra state may have any form; what is looked at is whether there is one.

    Args:
        module: the net.
        saved: its state.
        file: where that comes from, for the message.
        left_out: what it lacks on purpose; see `dtrain.checkpoint.left_out`.

    Raises:
        UsageError: they are another net's; the first parameter that differs is named.
    """
    keys = extra_keys(module)
    own = {name: _form(value, name in keys) for name, value in module.state_dict().items()}
    there = {name: _form(value, name in keys) for name, value in saved.items()}
    for name in [*own, *(name for name in there if name not in own)]:
        if own.get(name) != there.get(name) and not (name in left_out and name in own and name not in there):
            raise UsageError(
                f"{file} does not match the model: {name} {there.get(name, _NOTHING)} in the file, and "
                f"{own.get(name, _NOTHING)} in the model. Was the recipe changed, or a model.* value "
                "set that differs from the run's?"
            )
    check_base(module, left_out, file)


_NOTHING = "is missing"


def _form(value: Any, is_extra: bool) -> str:
    return f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) and not is_extra else "is an extra state"
