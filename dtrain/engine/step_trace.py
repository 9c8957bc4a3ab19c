"""What a train step does on the device, noted operation by operation, to know whether a graph of it would be right.

A captured step is the operations of one step, done again and again: on the same memory, with the same Python numbers.
So it is right for a step that does the same operations each time, whose numbers are constants, which reads the same
memory (parameters, buffers, the optimizer's state) besides its batch, and from which nothing is read by the CPU. All of
this shows in the operations that reach torch's dispatcher, in the forward and in the backward pass. Two steps that
differ, or one that reads from the device, are refused, with the line of the user's code.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

import dtrain
from dtrain.errors import StepError

_OFF = "set train.cuda_graph=false."
_TORCH = str(Path(torch.__file__).parent)
_OWN, _BUNDLED = str(Path(dtrain.__file__).parent), str(Path(dtrain.__file__).parent / "recipes")
_MOST_NUMBERS = 64  # of a tensor made of Python's, that are compared
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
_MOVING = (
    *("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"),
    *("manual_seed", "manual_seed_all", "seed", "seed_all"),
)


class Operation(NamedTuple):
    """One operation of a step.

    Attributes:
        function: of torch.
        arguments: its tensors by where they come from, and all else as it is.
        place: the line of the user's code, "" in a thread of torch's own.
    """

    function: Any
    arguments: tuple[Any, ...]
    place: str


class StepTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations of one step while it is entered, and refuses those that no graph can have.

    Args:
        device: the rank's.
        batch: the tensors of the step's batch.
        grads: the gradients that there are before the step, by position; they are made anew for each optimizer step.

    Attributes:
        operations: in their order.
        outside: the tensors that were read and are neither of the batch nor made by the step; kept alive.
    """

    def __init__(self, device: torch.device, batch: Iterable[Tensor], grads: Iterable[Tensor | None] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.outside: dict[int, Tensor] = {}
        self._device = device
        self._names: dict[int, tuple[Any, ...]] = {}
        self._starts: dict[int, int] = {}  # of the batch's tensors in their memory, which is that of a whole data set
        for number, tensor in enumerate(batch):
            where = _storage(tensor)
            self._names.setdefault(where, ("batch", number))
            self._starts.setdefault(where, int(tensor.storage_offset()))
        for number, grad in enumerate(grads):
            if grad is not None:
                self._names.setdefault(_storage(grad), ("grad", number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes and runs one operation."""
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        place = place_of(sys._getframe(1))
        self._refuse(func, args, kwargs, given, place)
        described = tuple(self._described(part) for part in (*args, *kwargs.items()))
        if func.name() == "aten::lift_fresh":  # of torch.tensor(...), on the CPU
            described = (("made of", repr(given[0].tolist()) if given[0].numel() <= _MOST_NUMBERS else ""),)
        returned = func(*args, **kwargs)
        made = list(_tensors((returned,)))
        self._refuse_mixed(func, given, made, place)
        before = {_storage(tensor) for tensor in given}
        for number, tensor in enumerate(made):
            where = _storage(tensor)
            if where not in before or func.name() == "aten::lift_fresh":
                self._names[where] = ("made", len(self.operations), number)
                self._starts.pop(where, None)
                self.outside.pop(where, None)
        self.operations.append(Operation(func, described, place))
        return returned

    def _described(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            where = _storage(part)
            if where not in self._names:
                self._names[where] = ("outside", where, part.untyped_storage().data_ptr())
                self.outside[where] = part.detach()
            start = part.storage_offset() - self._starts.get(where, 0)
            return *self._names[where], part.dtype, tuple(part.shape), part.stride(), start
        if isinstance(part, (list, tuple)):
            return tuple(self._described(one) for one in part)
        return type(part), repr(part)  # equal for NaN, too

    def _refuse(self, func: Any, args: Any, kwargs: Mapping[str, Any], given: Sequence[Tensor], place: str) -> None:
        name = func.name().partition(".")[0]
        if any(t.layout is not torch.strided or t.is_nested or is_traceable_wrapper_subclass(t) for t in given):
            raise refusal(place, f"uses a sparse, nested or distributed tensor ({name})", "Use dense tensors, ")
        if torch.Tag.data_dependent_output in func.tags:
            raise host_read(place, name)
        sized = torch.Tag.dynamic_output_shape in func.tags and name not in _INDEXING
        masks = name in _INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))
        if (sized and kwargs.get("output_size") is None) or masks:
            what = "indexes with a mask" if masks else "makes a tensor whose size depends on values"
            raise refusal(
                place, f"{what} ({name}), which the CPU has to wait for", "Use torch.where or a weighted sum, "
            )
        if any(self._names.get(_storage(tensor), ("",))[0] == "batch" for tensor in _written(func, args, kwargs)):
            raise refusal(
                place,
                f"changes a tensor of the batch in place ({name}), and a graph has a copy of it",
                "Make a new one, as in x = x + 1, ",
            )
        if kwargs.get("generator") is not None:
            raise refusal(place, "draws from a torch.Generator of its own", "Draw from the default generator, ")
        if name == "aten::lift_fresh" and not given[0].is_cpu:
            raise refusal(
                place,
                "makes a tensor from Python numbers on the device, which is a copy from the CPU",
                "Make it once, outside of the step, or with torch.full, ",
            )

    def _refuse_mixed(self, func: Any, given: Sequence[Tensor], made: Sequence[Tensor], place: str) -> None:
        kinds = {tensor.device.type for tensor in (*given, *made)}
        if len(kinds) < 2:
            return
        name = func.name().partition(".")[0]
        if any(tensor.is_cpu for tensor in made) and any(not tensor.is_cpu for tensor in given):
            raise host_read(place, name)
        raise refusal(
            place,
            f"uses a tensor of the CPU ({name}), whose values of now a graph would keep",
            f"Put it on {self._device.type} once, outside of the step, ",
        )


@contextmanager
def watched_draws(device: torch.device) -> Iterator[None]:
    """While inside, a step must not draw random numbers on the CPU, nor move the generators.

    Raises:
        StepError: it does; a graph would use the numbers of one step for all.
    """
    before = _host_states(device)
    moved: list[str] = []
    with ExitStack() as stack:
        for module in (torch, torch.random, torch.cuda, torch.cuda.random):
            for name in _MOVING:
                if hasattr(module, name):
                    stack.enter_context(_noted(module, name, moved))
        yield
    if moved:
        raise refusal(
            moved[0],
            "reads or sets the state of a random generator, as activation checkpointing does",
            "Remove train.activation_checkpointing or torch.utils.checkpoint (preserve_rng_state=False where the "
            "recomputed part has no dropout), ",
        )
    for name, state in _host_states(device).items():
        if state != before[name]:
            raise refusal("", f"draws from {name}, on the CPU", "Draw with torch on the device, ")


@contextmanager
def _noted(module: Any, name: str, places: list[str]) -> Iterator[None]:
    """Notes the lines that call a function of a module."""
    original = getattr(module, name)

    @functools.wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        places.append(place_of(sys._getframe(1)))
        return original(*args, **kwargs)

    setattr(module, name, noted)
    try:
        yield
    finally:
        setattr(module, name, original)


def _host_states(device: torch.device) -> dict[str, Any]:
    own = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "Python's random": random.getstate(),
        "NumPy's random numbers": (own[1].tobytes(), own[2]),  # type: ignore[index]
    }
    if device.type != "cpu":
        found["torch's generator of the CPU"] = bytes(torch.default_generator.get_state().numpy())
    return found


def difference(one: StepTrace, other: StepTrace) -> tuple[str, str] | None:
    """Compares what two steps did.

    Returns:
        None where it is the same; else the line of the user's code, "" for an unknown one, and the difference in words.
    """
    places = [operation.place for operation in (*one.operations, *other.operations)]
    for a, b in zip(one.operations, other.operations, strict=False):
        if a[:2] != b[:2]:
            return (a.place or b.place), _words(a, b)
    if len(one.operations) == len(other.operations):
        return None
    longer = max(one.operations, other.operations, key=len)
    where = longer[min(len(one.operations), len(other.operations))].place
    return where or next(filter(None, places), ""), (
        f"did {len(one.operations)} operations in one step and {len(other.operations)} in another"
    )


def _words(a: Operation, b: Operation) -> str:
    name, second = (one.function.name().partition(".")[0].removeprefix("aten::") for one in (a, b))
    if a.function is not b.function:
        return f"did {name} in one step and {second} in another"
    for x, y in zip(_leaves(a.arguments), _leaves(b.arguments), strict=False):
        if x != y and "outside" in (x[0], y[0]):
            return (
                f"reads in {name} a tensor that is another one at each step: one that an earlier step has made, or "
                "that is made anew outside of torch"
            )
        if x != y and isinstance(x[0], type) and isinstance(y[0], type):
            return f"computes {name} with the Python number {x[1]} in one step and {y[1]} in another"
    return f"computes {name} of other tensors or shapes in one step than in another"


def _leaves(described: Any) -> Iterator[Any]:
    if isinstance(described, tuple) and described and (isinstance(described[0], (str, type))):
        yield described
    elif isinstance(described, tuple):
        for part in described:
            yield from _leaves(part)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _tensors(parts: Iterable[Any]) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from _tensors(part)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    if func._schema.is_mutable:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _tensors((args[number] if number < len(args) else kwargs.get(argument.name),))


def place_of(frame: FrameType | None) -> str:
    """Returns the file and line of the innermost frame that is neither torch's nor dtrain's; "" where none is."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_BUNDLED) or not name.startswith((_TORCH, _OWN, "<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def refusal(place: str, what: str, remedy: str = "") -> StepError:
    """Returns the error for a step that cannot be captured.

    Args:
        place: the line of the user's code; "" for an unknown one.
        what: it does, in words that follow "the train step".
        remedy: what helps, besides leaving the graph out; it ends with a comma and a space.
    """
    where = f"{place}: " if place else ""
    advice = f"{remedy}or {_OFF}" if remedy else f"S{_OFF[1:]}"
    return StepError(f"train.cuda_graph: {where}the train step {what}. {advice}")


def host_read(place: str, name: str) -> StepError:
    """Returns the error for a step from which the CPU reads a value of the device."""
    return refusal(
        place,
        f"reads a value of the device on the CPU ({name.removeprefix('aten::')}: .item(), .cpu(), bool(), print() and "
        "the like)",
        "Return values as tensors, and choose with torch.where, ",
    )
