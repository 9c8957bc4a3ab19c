"""The net's forward compiled by torch.compile, where the config or Accelerate's settings ask for it.

What is compiled is the innermost of what stands in for the net's forward: inside of autocast and of DDP, as torch
advises, whose own splitting of graphs at DDP's buckets works there as well. The net stays as it is: the names in its
`state_dict()`, its attributes, hooks and methods. A call of the net is compiled, whoever makes it; a method that a step
calls by itself is not.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import nn

from dtrain.distributed.world import World
from dtrain.errors import UsageError
from dtrain.model.forwards import forward_replaced

Compile = Literal[False, True, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_DEFAULT = "default"
_INDUCTOR = "inductor"


@dataclass(frozen=True)
class Compilation:
    """How torch.compile is called.

    Attributes:
        backend: of torch.compile.
        mode: of inductor.
        fullgraph: whether a break of the graph is an error.
        dynamic: whether sizes may change; None: they are taken as fixed until a first one changes.
    """

    backend: str = _INDUCTOR
    mode: str = _DEFAULT
    fullgraph: bool = False
    dynamic: bool | None = None

    def __call__(self, function: Any) -> Any:
        """Returns the function compiled: at its first call."""
        mode = None if self.mode == _DEFAULT else self.mode
        return torch.compile(function, backend=self.backend, mode=mode, fullgraph=self.fullgraph, dynamic=self.dynamic)


def check_compile(asked: object) -> None:
    """Refuses what torch.compile does not take.

    Raises:
        UsageError: it is neither true, false nor a mode.
    """
    if asked is not None and asked not in get_args(Compile):
        raise UsageError(f"compile = {asked!r}: should be {', '.join(map(repr, get_args(Compile)))}, or None.")


def compilation(asked: Compile | None, world: World) -> Compilation | None:
    """Returns how a run compiles, as `wanted` does, once it was tried.

    Raises:
        UsageError: as from `wanted`; or it cannot work here.
    """
    found = wanted(asked, world)
    if found is not None:
        _check_works(found, world.device.type)
    return found


def wanted(asked: Compile | None, world: World) -> Compilation | None:
    """Returns how a run is to compile: as asked for, else as Accelerate's settings say; None where it is not.

    Raises:
        UsageError: both say something, and not the same.
    """
    launched = _accelerates(world)
    if launched is not None:
        return launched if asked is None else _agreed(asked, launched)
    return Compilation(mode=_DEFAULT if asked is True else asked) if asked else None


def _accelerates(world: World) -> Compilation | None:
    """What Accelerate's settings say (a profile, `accelerate launch`, ACCELERATE_DYNAMO_...)."""
    plugin = world.accelerator.state.dynamo_plugin
    backend = str(getattr(plugin.backend, "value", plugin.backend) or "NO").lower()
    if backend == "no":
        return None
    if plugin.use_regional_compilation:
        raise UsageError(
            "dynamo_use_regional_compilation (from Accelerate's settings) is not supported: the model is compiled as "
            "a whole. Remove it."
        )
    return Compilation(backend, plugin.mode or _DEFAULT, bool(plugin.fullgraph), plugin.dynamic)


def _agreed(asked: Compile, launched: Compilation) -> Compilation:
    modes = (launched.mode,) if launched.mode != _DEFAULT else (_DEFAULT, asked)
    if asked is True or (asked in modes and launched.backend == _INDUCTOR):
        mode = launched.mode if asked is True else str(asked)
        return Compilation(launched.backend, mode, launched.fullgraph, launched.dynamic)
    said = str(asked).lower() if isinstance(asked, bool) else asked
    raise UsageError(
        f"train.compile = {said}, but Accelerate's settings say {launched.backend}, mode {launched.mode} "
        "(dynamo_backend and dynamo_mode in a profile, or ACCELERATE_DYNAMO_...). Use only one of the two."
    )


@functools.cache
def _check_works(how: Compilation, device: str) -> None:
    """Compiles next to nothing, so that what is missing on this machine is told before training starts.

    Raises:
        UsageError: there is no compiler, or the trial failed.
    """
    remedy = "or disable torch.compile (train.compile=false, dynamo_backend: 'no')."
    if how.backend == _INDUCTOR and device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UsageError(
                "torch.compile needs a C++ compiler on the CPU, and none was found: install g++ (apt-get install g++, "
                f"module load gcc), or name one in CXX; {remedy}"
            ) from None
    try:
        trial = Compilation(how.backend)(_add_one)
        trial(torch.zeros(2, device=device))
    except Exception as error:  # noqa: BLE001 - whatever it is, it would come in the first step
        first = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"torch.compile (backend {how.backend}) does not work on this machine: {type(error).__name__}: {first}. "
            f"Install what is missing, {remedy}"
        ) from None


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@contextlib.contextmanager
def compiled(net: nn.Module, how: Compilation | None) -> Iterator[None]:
    """While inside, calls of the net are compiled; then it is as before.

    Args:
        net: its parameters, buffers and names stay what they are.
        how: None for not at all.
    """
    if how is None:
        yield
        return
    forward = net.forward
    function = getattr(forward, "__func__", None)
    # Bound to the net as before, so that a copy of the net has its own.
    with forward_replaced(net, how(forward) if function is None else MethodType(how(function), net)):
        yield


@contextlib.contextmanager
def by_us_alone(world: World) -> Iterator[None]:
    """While inside, Accelerate compiles nothing that it prepares."""
    from accelerate.utils import DynamoBackend

    plugin = world.accelerator.state.dynamo_plugin
    before, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = before


class CompileClock:
    """How long this process compiles, and records CUDA graphs: torch tells when it begins and ends to."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0
        self._handler: Any = torch._dynamo.callback_handler  # type: ignore[attr-defined]
        self._handler.register_start_callback(self._begin)
        self._handler.register_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._began = time.perf_counter()

    def _end(self, _: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Returns the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() has cleared them
            self._handler.remove_start_callback(self._begin)
            self._handler.remove_end_callback(self._end)
