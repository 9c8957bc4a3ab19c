"""A net traced by torch.export for batches of any size, and its refusals in short words."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dtrain.errors import UsageError
from dtrain.tools.export.model_call import WEIGHTS_ALONE, ModelCall

BATCH = "batch"  # what the dimension is called
_TORCH = str(Path(torch.__file__).parent)
_PLACE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.+)')
_REMEDY = f"Change the model, or: {WEIGHTS_ALONE}"


def traced(net: nn.Module, call: ModelCall) -> torch.export.ExportedProgram:
    """Returns a net as a program that takes batches of any size.

    Args:
        net: the net, in eval mode.
        call: how it is called; its other dimensions are fixed.

    Raises:
        UsageError: torch.export cannot trace it, or it takes batches of one size alone.
    """
    many = call if call.samples > 1 else call.rows(torch.tensor([0, 0]))  # a dimension of 1 would be taken for fixed
    batch = torch.export.Dim(BATCH)

    def dims(leaf: Any) -> Any:
        return {0: batch} if many.is_batched(leaf) else None

    shapes = _by_name(net, tree_map(dims, many.args), tree_map(dims, many.kwargs))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
            return torch.export.export(net, many.args, many.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # noqa: BLE001 - its own kinds, by no common base
        raise UsageError(f"torch.export cannot trace the model: {_words(error)} {_REMEDY}") from None


def _by_name(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
    """Dimensions as torch.export takes them: by the names of forward's parameters where some are given by name."""
    if not kwargs:
        return args
    import inspect

    bound = inspect.signature(net.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _words(error: BaseException) -> str:
    """Torch's many lines as one sentence, with the user's line."""
    text = str(error)
    if "specialized it to be a constant" in text or "Constraints violated" in text:
        fixed = re.search(rf"{BATCH} = (\d+)", text)
        size = f" of {fixed[1]} samples" if fixed else ""
        return (
            f"it only takes batches{size}, since a size of the batch is written into the model, as in x.view(32, -1). "
            "Use len(x) or -1 for the batch's dimension."
        )
    if "data-dependent" in text or "Dynamic control flow" in text:
        return (
            f"what it computes depends on values of the data, as in `if x.sum() > 0`{_place(error)}. Use torch.where."
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {first.rstrip('.')}{_place(error)}."


def _place(error: BaseException) -> str:
    """Where in the user's code it happened, in words; nothing where that is unknown."""
    for file, line, _, code in reversed(_PLACE.findall(str(error))):
        if not file.startswith(_TORCH):
            return f" ({file}, line {line}: {code.strip()})"
    found = error.__traceback__
    place = ""
    while found is not None:
        file = found.tb_frame.f_code.co_filename
        if not file.startswith((_TORCH, str(Path(__file__).parent))) and Path(file).is_file():
            place = f" ({file}, line {found.tb_lineno})"
        found = found.tb_next
    return place


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's remarks on its own parts from the screen; what is wrong is raised, not logged."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
