"""What stands for CUDA graphs on the CPU: a tape of torch's operations, recorded without being done, and played again.

As with a graph, only what reached the device is on it: no Python is run again, Python numbers are those of the
recording, and each operation reads and writes the memory that it had there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(parts: Any) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from _tensors(part)


def _writes(func: Any) -> bool:
    """Whether an operation writes to what it is given; of batch norm the schema does not say so."""
    return func._schema.is_mutable or "batch_norm" in func.name()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()
        self._kept: list[Any] = []  # no memory is given to another tensor while the tape is there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = list(_tensors((*args, *kwargs.values())))
        for tensor in given:
            memory = _memory(tensor)
            if _writes(func) and memory not in self._own and memory not in self.before:
                self.before[memory] = tensor, torch.empty(0).set_(tensor.untyped_storage().clone())
        made = func(*args, **kwargs)
        known = {_memory(tensor) for tensor in given}
        fresh = [tensor for tensor in _tensors((made,)) if _memory(tensor) not in known]
        self._own |= {_memory(tensor) for tensor in fresh}
        # What is done again: not what only looks at memory in another way.
        if fresh or _writes(func):
            kept = (func, _detached(args), _detached(kwargs), [tensor.detach() for tensor in fresh])
            self.operations.append(kept)
        self._kept.append((_detached(args), [tensor.detach() for tensor in _tensors((made,))]))
        return made

    def undo(self) -> None:
        """As it was before: a capture does nothing."""
        for tensor, value in self.before.values():
            tensor.untyped_storage().copy_(value.untyped_storage())

    def play(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs in self.operations:
                made = list(_tensors((func(*args, **kwargs),)))
                if outputs:
                    for own, new in zip(outputs, made, strict=True):
                        own.copy_(new)


def _detached(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.detach()
    if isinstance(part, (list, tuple)):
        return type(part)(_detached(one) for one in part)
    if isinstance(part, dict):
        return {name: _detached(one) for name, one in part.items()}
    return part


class Tapes:
    """As `dtrain.engine.cuda_graphs.CudaGraphs`, on the CPU.

    Attributes:
        log: what was done.
        beside_: whether operations go to the captures' stream.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.inside = False

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    @contextlib.contextmanager
    def strict(self) -> Iterator[None]:
        yield

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        assert self.inside
        recorder = _Recorder()
        state = torch.get_rng_state()
        with recorder:
            returned = function()
        recorder.undo()
        torch.set_rng_state(state)
        self.log.append("capture")

        def replay() -> None:
            assert not self.inside
            self.log.append("replay")
            recorder.play()

        return replay, returned
