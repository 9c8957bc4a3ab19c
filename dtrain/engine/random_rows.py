"""Random numbers for a part of a batch that are those which one process draws for the whole of it.

While a `Part` is set, a random function that gives a row to each sample of this rank's part draws the numbers of the
whole global batch, in the memory layout that one process has, and keeps this rank's rows. So dropout masks and noise
are those of one process, and the stream ends where that of one process does. What is not shaped after the batch is
drawn as it is: on ranks whose streams are alike, alike.

It is done where torch dispatches its random functions, below autograd and above the devices: for the key BackendSelect,
at which these functions have no kernel of their own. So whoever calls them (`dropout`, attention, `nn.LSTM`,
`torch.rand`, the recomputation of a part of the net in the backward) is covered, and what draws nothing costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.engine.row_evidence import UNKNOWN, RowEvidence, ShapeExchange, place_of
from dtrain.engine.row_parts import one_row, own, whole_like
from dtrain.engine.row_rule import Part, by_shape_of, if_as_many, if_several, is_weight, known_layout
from dtrain.errors import StepError, UsageError

_KEY = "BackendSelect"

# In place, one number (or as many as one element takes) for each element.
_FILLS = (
    "bernoulli_.float",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "random_.from",
    "random_.to",
    "uniform_",
)
_LIKE = ("rand_like", "randint_like", "randint_like.low_dtype", "randn_like")  # call the former
# How many numbers they take depends on the arguments' values.
_REJECTING = ("_sample_dirichlet", "_standard_gamma", "binomial", "poisson")
_WITHIN = {  # draw within a device's kernel: the position and the name of the argument which says whether they do
    "_scaled_dot_product_cudnn_attention": (5, "dropout_p"),
    "_scaled_dot_product_efficient_attention": (5, "dropout_p"),
    "_scaled_dot_product_flash_attention": (3, "dropout_p"),
    "rrelu_with_noise": (4, "training"),
    "rrelu_with_noise_": (4, "training"),
}

# What torch.compile's kernels draw from the stream: seeds, of numbers which they make by themselves.
_SEEDS_OF_COMPILED = (-(2**63), 2**63 - 1)
_COMPILED = (
    "same_draws: code compiled by torch.compile draws random numbers (dropout?), which would differ from those of a "
    "single process. Compile only code that draws none, set "
    "torch._inductor.config.fallback_random = True before compiling, or train.same_draws=false (same_draws=False)."
)


@dataclass
class _Current:
    """What this process draws for, on whichever thread."""

    part: Part | None = None
    evidence: RowEvidence | None = None
    meeting: ShapeExchange | None = None
    weights: Callable[[], Iterable[Tensor]] = tuple
    like: Tensor | None = None  # what numbers are being drawn for
    drawn: bool = False  # whether something was drawn for a part since `draw_for` set it
    apart: set[str] = field(default_factory=set)  # what was drawn, and cannot be what one process draws
    library: Any = field(default=None, repr=False)


_CURRENT = _Current()


def draw_for(
    part: Part | None,
    evidence: RowEvidence | None = None,
    meeting: ShapeExchange | None = None,
    weights: Callable[[], Iterable[Tensor]] = tuple,
) -> None:
    """Has random functions draw for a part of a batch from now on.

    Args:
        part: None: they draw as they are called.
        evidence: tells which dimensions go along the batch, and learns more of it; None: the shapes alone do.
        meeting: has the ranks tell each other the shapes, where they have different numbers of rows.
        weights: returns the net's parameters.
    """
    if part is not None:
        _install()
        _CURRENT.drawn = False
    _CURRENT.part, _CURRENT.evidence, _CURRENT.meeting, _CURRENT.weights = part, evidence, meeting, weights


def put_part(part: Part | None) -> Part | None:
    """Has them draw for another part, within what `draw_for` has begun, and returns the one that they drew for."""
    before, _CURRENT.part = _CURRENT.part, part
    return before


def has_drawn() -> bool:
    """Whether more than one number was drawn for the last part."""
    return _CURRENT.drawn


def take_apart() -> set[str]:
    """Returns what was drawn since the last time, and cannot be what one process draws, in words."""
    found, _CURRENT.apart = _CURRENT.apart, set()
    return found


def shapes_of(parameters: Iterable[Tensor]) -> frozenset[tuple[int, ...]]:
    """Returns the shapes of parameters."""
    return frozenset(tuple(parameter.shape) for parameter in parameters)


def check_supported() -> None:
    """Sees to it that this torch has what `draw_for` builds on, of which parts are not documented.

    Raises:
        UsageError: it has not.
    """
    try:
        _install()
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"same_draws: torch {torch.__version__} does not let dtrain control its random functions ({error}). Set "
            "train.same_draws=false (same_draws=False in Python): each rank then draws its own random numbers.",
            on_all_ranks=True,
        ) from error


@functools.cache
def _below() -> Any:
    return torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


@functools.cache
def _install() -> None:
    """Registers the functions below, once in a process that needs them; elsewhere they only pass calls on."""
    make_library: Any = torch.library.Library
    library = make_library("aten", "IMPL")
    _ = _below(), torch._C._AutoDispatchBelowADInplaceOrView  # to be missed here, and not in a step
    makers: dict[str, Callable[[Any], Callable[..., Any]]] = {
        **dict.fromkeys(_FILLS, _filling),
        **dict.fromkeys(_REJECTING, _rejecting),
        **{name: functools.partial(_within, *said) for name, said in _WITHIN.items()},
        **dict.fromkeys(_LIKE, _alike),
        "bernoulli_.Tensor": _filling_by_odds,
        "multinomial": _choosing,
        "native_dropout": _dropping,
        "normal.Tensor_Tensor": _normal,
        "normal.Tensor_float": _normal,
        "normal.float_Tensor": _normal,
        "randperm.generator_out": _permuting,
    }
    for name, make in makers.items():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, make(operator), _KEY, with_keyset=True)
    _CURRENT.library = library  # in use as long as somebody holds it


# --- the random functions ------------------------------------------------------------------------------------


def _filling(operator: Any) -> Callable[..., Any]:
    def fill(keys: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part, keys = _CURRENT.part, keys & _below()
        if part is not None and args == _SEEDS_OF_COMPILED:
            raise StepError(_COMPILED)
        dimension = None if part is None else row_dimension(tensor, part)
        if part is None or dimension is None:
            return operator.redispatch(keys, tensor, *args, **kwargs)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            whole = whole_like(tensor, dimension, part)
            operator.redispatch(keys, whole, *args, **kwargs)
            tensor.copy_(own(whole, dimension, part))
        return tensor

    return fill


def _alike(operator: Any) -> Callable[..., Any]:
    """`torch.randn_like(x)` and the like: what they call is told of `x`."""

    def draw(keys: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _for(tensor):
            return operator.redispatch(keys & _below(), tensor, *args, **kwargs)  # type: ignore[no-any-return]

    return draw


@contextlib.contextmanager
def _for(like: Tensor | None) -> Iterator[None]:
    """While inside, numbers are drawn for a tensor; for an unknown one where it is None."""
    before, _CURRENT.like = _CURRENT.like, like
    try:
        yield
    finally:
        _CURRENT.like = before


def _filling_by_odds(operator: Any) -> Callable[..., Any]:
    """`Tensor.bernoulli_(p)` with a probability for each element: a number each, whatever the probability is."""

    def fill(keys: Any, tensor: Tensor, odds: Tensor, **kwargs: Any) -> Tensor:
        part, keys = _CURRENT.part, keys & _below()
        dimension = None if part is None else row_dimension(tensor, part, odds)
        if part is None or dimension is None:
            return operator.redispatch(keys, tensor, odds, **kwargs)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            whole = whole_like(tensor, dimension, part)
            all_odds = torch.zeros_like(whole, dtype=odds.dtype, device=odds.device)
            own(all_odds, dimension, part).copy_(odds)
            operator.redispatch(keys, whole, all_odds, **kwargs)
            tensor.copy_(own(whole, dimension, part))
        return tensor

    return fill


def _normal(operator: Any) -> Callable[..., Any]:
    """`torch.normal` of tensors, as torch composes it: of what it draws, with the kernel that it calls itself."""

    def draw(keys: Any, mean: Any, std: Any = 1.0, generator: Any = None) -> Tensor:
        if _CURRENT.part is None:
            return operator.redispatch(keys & _below(), mean, std, generator=generator)  # type: ignore[no-any-return]
        like = next((one for one in (mean, std) if is_weight(one, _CURRENT.weights())), None)
        with torch._C._AutoDispatchBelowADInplaceOrView(), _for(like):
            drawn = torch.empty_like(mean + std, memory_format=torch.contiguous_format)
            if not isinstance(std, Tensor):
                return drawn.normal_(0, std, generator=generator).add_(mean)
            return drawn.normal_(generator=generator).mul_(std).add_(mean)

    return draw


def _choosing(operator: Any) -> Callable[..., Any]:
    """`torch.multinomial`: choices with replacement take a number each, others are drawn as other functions are."""

    def choose(keys: Any, odds: Tensor, samples: int, replacement: bool = False, *, generator: Any = None) -> Tensor:
        part, keys = _CURRENT.part, keys & _below()
        how = {"generator": generator}
        if part is None or not replacement or (samples == 1 and odds.ndim > 1):
            return operator.redispatch(keys, odds, samples, replacement, **how)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if odds.ndim == 1 and _dimension_of((samples,), part, if_several) == 0:  # so many for each sample
                whole = operator.redispatch(keys, odds, samples // part.rows * part.total, replacement, **how)
                return own(whole, 0, part).clone()
            if odds.ndim == 1 or row_dimension(odds, part, odds) != 0:
                return operator.redispatch(keys, odds, samples, replacement, **how)  # type: ignore[no-any-return]
            all_odds = torch.ones_like(whole_like(odds, 0, part))
            own(all_odds, 0, part).copy_(odds)
            return own(operator.redispatch(keys, all_odds, samples, replacement, **how), 0, part).clone()

    return choose


def _dropping(operator: Any) -> Callable[..., Any]:
    """Dropout in one kernel, as on GPUs; on the CPU it is made of the functions above."""

    def drop(keys: Any, tensor: Tensor, odds: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
        part, keys = _CURRENT.part, keys & _below()
        dimension = None if part is None or tensor.is_cpu or train is False else row_dimension(tensor, part, tensor)
        if part is None or dimension is None:
            return operator.redispatch(keys, tensor, odds, train)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            whole = torch.ones_like(whole_like(tensor, dimension, part))
            mask = own(operator.redispatch(keys, whole, odds, True)[1], dimension, part).clone()
            return tensor * mask * (0.0 if odds == 1 else 1 / (1 - odds)), mask

    return drop


def _permuting(operator: Any) -> Callable[..., Any]:
    """`torch.randperm(samples of the batch)`: an order of this rank's own rows, since it cannot have others'."""

    def permute(keys: Any, n: int, *, generator: Any = None, out: Tensor) -> Tensor:
        part, keys = _CURRENT.part, keys & _below()
        if part is None or _dimension_of((n,), part, if_as_many) is None or n != part.rows:
            return operator.redispatch(keys, n, generator=generator, out=out)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            whole = out.new_empty(part.total)
            _CURRENT.apart.add("an order of the batch's samples (torch.randperm(len(batch)), as in mixup)")
            operator.redispatch(keys, part.total, generator=generator, out=whole)
            out.resize_(n)
            return out.copy_(own(whole, 0, part).argsort())

    return permute


def _rejecting(operator: Any) -> Callable[..., Any]:
    """Known where all rows have the same arguments; else each rank draws numbers of its own."""

    def draw(keys: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part, keys = _CURRENT.part, keys & _below()
        batched = part is not None and (tensor.ndim > 1 or operator is not torch.ops.aten._sample_dirichlet.default)
        dimension = row_dimension(tensor, part, tensor) if part is not None and batched else None
        if part is None or dimension is None:
            return operator.redispatch(keys, tensor, *args, **kwargs)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            given = [tensor, *(one for one in args if isinstance(one, Tensor))]
            rows = [one_row(one, dimension) if one.shape == tensor.shape else None for one in given]
            if any(row is None for row in rows):
                return _forked(operator, keys, part, tensor, *args, **kwargs)  # type: ignore[no-any-return]
            shape = whole_like(tensor, dimension, part).shape
            same = [row.expand(shape).contiguous() for row in rows if row is not None]
            rest = [one for one in args if not isinstance(one, Tensor)]
            return own(operator.redispatch(keys, *same, *rest, **kwargs), dimension, part).clone()

    return draw


def _within(position: int, name: str, operator: Any) -> Callable[..., Any]:
    """What the whole batch's numbers cannot be had of: each rank draws numbers of its own."""

    def draw(keys: Any, *args: Any, **kwargs: Any) -> Any:
        part, keys = _CURRENT.part, keys & _below()
        draws = args[position] if len(args) > position else kwargs.get(name)
        if part is None or not draws:
            return operator.redispatch(keys, *args, **kwargs)
        return _forked(operator, keys, part, *args, **kwargs)

    return draw


# --- what they are made of -----------------------------------------------------------------------------------


def row_dimension(tensor: Tensor, part: Part, like: Tensor | None = None) -> int | None:
    """Returns which dimension of a random tensor goes along the batch; None where none does.

    Args:
        tensor: of the shape that is drawn.
        part: of the batch.
        like: what the numbers are drawn for, if that is known.
    """
    if tensor.ndim == 0 or tensor.requires_grad or type(tensor) is nn.Parameter:
        return None
    like = _CURRENT.like if like is None else like
    return _dimension_of(
        tuple(tensor.shape), part, lambda shape, part: by_shape_of(like, shape, part, _CURRENT.weights())
    )


def _dimension_of(shape: tuple[int, ...], part: Part, rule: Callable[..., int | None]) -> int | None:
    """The same for a shape: by what is known of the place that draws, else by a rule."""
    _CURRENT.drawn = _CURRENT.drawn or shape != (1,)
    evidence, meeting, rows = _CURRENT.evidence, _CURRENT.meeting, part.rows
    if evidence is None:
        return rule(shape, part)
    where = place_of()
    for other_rows, other_shape in () if meeting is None else meeting.told(where, rows, shape):
        if len(other_shape) == len(shape):
            evidence.note(where, other_rows, other_shape, UNKNOWN)
    if shape.count(rows) > 1 and known_layout() is not None:
        return rule(shape, part)  # a layer of torch's own, with as many steps as samples
    known = evidence.dimension(where, rows, shape)
    taken = rule(shape, part) if known == UNKNOWN else known
    evidence.note(where, rows, shape, taken)
    return taken


def _forked(operator: Any, keys: Any, part: Part, *args: Any, **kwargs: Any) -> Any:
    """Calls a random function with numbers that depend on the rank's place; the stream goes on alike on all ranks."""
    _CURRENT.apart.add(f"{str(operator).split('.')[1].strip('_')}, which takes as many numbers as its values need")
    device = next(one.device for one in args if isinstance(one, Tensor))
    given = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Generator)), None)
    generator: Any = given or _default_generator(device)
    torch.empty((), device=device).uniform_(generator=generator)
    state = generator.get_state()
    generator.manual_seed(zlib.crc32(bytes(state.numpy())) + part.first)
    try:
        return operator.redispatch(keys, *args, **kwargs)
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]  # type: ignore[no-any-return]
