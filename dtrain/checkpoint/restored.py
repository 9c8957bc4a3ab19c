"""A net as a checkpoint has it, for use and not for training: weights, and buffers that its `state_dict()` lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtrain.checkpoint.folder import read_manifest, verify_file
from dtrain.checkpoint.locate import RUN
from dtrain.checkpoint.state import load_buffers
from dtrain.checkpoint.tensors import read_file
from dtrain.checkpoint.tree import unflatten
from dtrain.checkpoint.weights import load_weights
from dtrain.errors import CheckpointError, UsageError

_BUFFERS = "buffers"  # of the state; see `run_state`


def restore_net(module: nn.Module, folder: Path) -> None:
    """Puts a checkpoint's weights into a net, as validation had them: averaged ones where the run has an average.

    Args:
        module: the net itself, on any device; it is left as it is where the weights do not fit.
        folder: the checkpoint's.

    Raises:
        UsageError: the checkpoint is damaged or another net's; the first parameter that differs is named.
    """
    buffers = _other_buffers(folder)
    load_weights(module, folder)
    load_buffers(module, buffers)


def _other_buffers(folder: Path) -> Mapping[str, Tensor]:
    """Returns the buffers with `persistent=False`; none of a checkpoint that holds weights alone."""
    structure, tensors = folder / f"{RUN}.json", folder / f"{RUN}.safetensors"
    try:
        files = read_manifest(folder)["files"]
        if structure.name not in files:
            return {}
        verify_file(structure, files[structure.name])
        (pairs,) = json.loads(structure.read_text()).values()  # of a dict; see `dtrain.checkpoint.tree`
        kept: Any = next((value for name, value in pairs if name == _BUFFERS), None)
        if kept is not None and "list" in kept:  # of a script's run: of each of its nets
            kept = next(iter(kept["list"]), None)
        if kept in (None, {"dict": []}):
            return {}
        verify_file(tensors, files[tensors.name])
        found: Mapping[str, Tensor] = unflatten(kept, read_file(tensors, f"{RUN}/{_BUFFERS}/")[0])
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise UsageError(f"{folder}: cannot read the buffers: {error}. Use another checkpoint.") from None
    return found
