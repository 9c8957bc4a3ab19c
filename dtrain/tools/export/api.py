"""`dtrain.export`: any net to a file, in one call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dtrain.errors import UsageError
from dtrain.tools.export.checked import TOLERANCE, check_place, export_net
from dtrain.tools.export.formats import format_of
from dtrain.tools.export.model_call import checked_call


def export(
    model: nn.Module,
    file: str | Path,
    inputs: Any,
    *,
    force: bool = False,
    tolerance: float = TOLERANCE,
) -> float:
    """Writes a model to a file, runs that file, and compares its outputs with the model's.

    `dtrain.export(dtrain.load("runs/first"), "first.onnx", features)`, as `dtrain export` does for a recipe's run.

    Args:
        model: it is exported in eval mode, from the CPU, and left as it is.
        file: ends in .safetensors (the weights alone), .pt2 (torch.export) or .onnx. The latter two take batches of any
            size; all dimensions but the first are those of `inputs`.
        inputs: of one batch: a tensor with a row for each sample; a tuple of several inputs, by position; or a dict, by
            name: `model(**inputs)`.
        force: whether a file that is there is replaced.
        tolerance: the difference that is let pass, relative to the largest absolute output (to 1, if that is less).

    Returns:
        the largest absolute difference of any output.

    Raises:
        UsageError: another ending; the file is there already; a package is missing; or the model cannot be traced.
        DtrainError: the outputs differ. Nothing is written then.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model = {model!r}: should be a torch.nn.Module, such as dtrain.load(RUN) returns.")
    target = Path(file).expanduser()
    kind = format_of(None, target)
    check_place(target, force=force)
    inputs = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, inputs)
    named = dict(inputs) if isinstance(inputs, dict) else {}
    args = () if isinstance(inputs, dict) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    call = checked_call(args, named, batched=kind.is_program)
    net = copy.deepcopy(model).cpu()
    how: dict[str, Any] = {"kind": kind, "force": force, "tolerance": tolerance}
    return export_net(net, call, target, fresh=lambda: copy.deepcopy(net), **how).difference
