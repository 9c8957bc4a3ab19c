"""In what precision a net computes: float32, or mixed with bfloat16 or float16 by torch's autocast.

The weights stay as they are (float32, as a rule), the net's forward computes in the lower precision where torch knows
that to be safe, and its outputs come back as float32, so that losses and metrics are computed in that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from dtrain.distributed.world import World
from dtrain.errors import UsageError
from dtrain.model.forwards import forward_replaced

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ACCELERATES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def check_precision(asked: object) -> None:
    """Refuses what is no precision.

    Raises:
        UsageError: it is none.
    """
    if asked not in (None, "fp32", *_DTYPES):
        raise UsageError(f"precision = {asked!r}: should be 'fp32', 'bf16' or 'fp16', or None.")


def chosen(asked: Precision | None, world: World) -> Precision:
    """Returns the precision of a run: the one asked for, else that of Accelerate's settings.

    Raises:
        UsageError: both say something, and not the same.
    """
    launched = world.accelerator.mixed_precision
    found = _ACCELERATES[launched]
    if asked is None or found in ("fp32", asked):
        return asked or found  # type: ignore[return-value]
    raise UsageError(
        f"train.precision = {asked}, but Accelerate's settings say {launched} (--mixed_precision, mixed_precision in a "
        "profile, or ACCELERATE_MIXED_PRECISION). Use only one of the two."
    )


@contextlib.contextmanager
def computing(net: nn.Module, precision: Precision, world: World) -> Iterator[None]:
    """While inside, the net is on the rank's device and its calls compute in a precision; then it is as before.

    It stays on the device.
    """
    net.to(world.device)
    if precision == "fp32":
        yield
        return
    with forward_replaced(net, _lowered(net, precision, world.device.type)):
        yield


def _lowered(net: nn.Module, precision: Precision, device: str) -> Callable[..., Any]:
    """The net's forward under autocast; bound to the net as before, so that a copy of the net has its own."""
    from accelerate.utils import convert_outputs_to_fp32

    forward = net.forward
    function = getattr(forward, "__func__", None)
    if function is None:
        return convert_outputs_to_fp32(_under_autocast(forward, device, precision))  # type: ignore[no-any-return]
    return MethodType(convert_outputs_to_fp32(_under_autocast(function, device, precision)), net)


def _under_autocast(function: Callable[..., Any], device: str, precision: Precision) -> Callable[..., Any]:
    """A function under autocast, one of its own for each call: one that is entered again forgets how it was before.

    A net that calls itself would so leave autocast on.
    """

    @wraps(function)
    def under(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=_DTYPES[precision]):
            return function(*args, **kwargs)

    return under


def scaler_of(precision: Precision, world: World) -> GradScaler | None:
    """Returns what keeps small float16 gradients from vanishing: the loss is scaled up, the gradients down again."""
    return GradScaler(world.device.type) if precision == "fp16" else None
