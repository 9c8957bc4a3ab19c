"""Counts where a user's step reads values of tensors on the device, for which a GPU has to finish all that it was sent.

What the optimizer reads (AdamW's counts of its steps, which lie on the CPU), what dtrain reads, and tensors that lie
elsewhere are no matter.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dtrain.data.partition import RankBatch
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.metrics import Value
from dtrain.version import PACKAGE, RECIPES

_TORCH, _OPTIMIZERS = (f"{Path(torch.__file__).parent}{os.sep}{part}" for part in ("", f"optim{os.sep}"))
_DTRAIN, _BUNDLED = f"{PACKAGE}{os.sep}", f"{RECIPES}{os.sep}"
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_SITES = ("site-packages", "dist-packages")

_NUMBERS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__")
_SHOWN = ("__repr__", "__format__", "__contains__", "is_nonzero", "equal")
_SHAPED = ("nonzero", "masked_select")  # whose result's shape is read
_READS = {getattr(torch.Tensor, name): name for name in (*_NUMBERS, *_SHOWN, *_SHAPED) if hasattr(torch.Tensor, name)}
_READS |= {getattr(torch, name): name for name in ("is_nonzero", "equal", "nonzero", "masked_select")}
_COPIES = {torch.Tensor.cpu: "cpu", torch.Tensor.to: "to"}


class HostReads(TorchFunctionMode):
    """Counts reads of tensors on a device by the line of the user's code from which they come.

    Args:
        device: where the tensors that count are.

    Attributes:
        places: "FILE:LINE (function)" -> number of reads.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._kind = device.type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and leaves every function as it is."""
        result = func(*args, **(kwargs or {}))
        name = _READS.get(func)
        if name is None and func in _COPIES and self._kind != "cpu" and isinstance(result, Tensor) and result.is_cpu:
            name = None if (kwargs or {}).get("non_blocking") else _COPIES[func]
        if name is not None and args and isinstance(args[0], Tensor) and args[0].device.type == self._kind:
            where = _users_line(sys._getframe(1))
            if where is not None:
                self.places[f"{where} ({name.strip('_')})"] += 1
        return result


def _users_line(frame: FrameType | None) -> str | None:
    """Returns FILE:LINE of the user's code that a call comes from; None where an optimizer or dtrain made it."""
    found: str | None = None
    users = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OPTIMIZERS):
            return None
        if file.startswith(_DTRAIN) and not file.startswith(_BUNDLED):
            if found is None or users:
                return found
        elif not users and not file.startswith(_TORCH):
            users = not _is_installed(file)
            found = f"{file}:{frame.f_lineno}" if users or found is None else found
        frame = frame.f_back
    return found


def _is_installed(file: str) -> bool:
    if file.startswith(_BUNDLED):
        return False
    return file.startswith((*_INSTALLED, "<")) or any(site in Path(file).parts for site in _SITES)


class CountReads(EngineCallback):
    """Counts what an engine's train steps read.

    Args:
        device: the rank's.

    Attributes:
        steps: number of steps.
    """

    order = Order.RECORDS

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._reads = HostReads(device)
        self._step = contextlib.ExitStack()

    def per_step(self) -> dict[str, float]:
        """Returns "FILE:LINE (function)" -> reads a step, in the order of their first ones."""
        return {shortened(place): count / max(1, self.steps) for place, count in self._reads.places.items()}

    def on_batch_start(self, batch: RankBatch) -> None:
        """A step begins."""
        self.steps += 1
        self._step.enter_context(self._reads)

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """A step is done."""
        self._step.close()

    def close(self) -> None:
        """Looks away, also in the midst of a step that failed."""
        self._step.close()


def shortened(place: str) -> str:
    """Returns a place with its file relative to the folder where dtrain was started, where it is below that."""
    with contextlib.suppress(ValueError):
        return str(Path(place).relative_to(Path.cwd()))
    return place
