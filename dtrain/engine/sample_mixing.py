"""Whether a loss mixes the samples before they are reduced, which shows in derivatives.

A mean of the samples' own terms has no second ones between the net's outputs of one sample and those of another::

    d2 loss / d out[i] d out[j] = 0    for samples i != j

So the gradients are derived once more along one sample's outputs, and what arrives at the other samples must be zero.
It is not for `out - out.mean(0)`, `softmax(0)`, `logcumsumexp(0)`, `z @ z.T`. What is linear in pieces has no second
derivatives: of `abs`, `relu`, a sort or a maximum it is looked at how many samples their input is made of, of a
distance how many it is between. Within the net the first ones tell: one sample's outputs depend on its own rows of what
the net's parts have returned, and on no other's.

The outputs are those of the net in this step; of the last parts that were called, where the net itself was not or gives
a loss alone. No parameter gets a gradient. Nothing that may have an effect of its own runs once more: not where hooks,
functions of the user's own or recomputation (checkpointing) lie between. Statistics of the batch that have no graph
(`out.detach().mean(0)`, of the inputs) show nowhere.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, _engine_run_backward, saved_tensors_hooks

from dtrain.engine.loss_graph import kind_of, nodes_below, saved_of, signed_of

_MOST_OUTPUTS = 256
_LAST, _MOST_PARTS = 3, 4  # parts whose outputs stand for the net's; parts that are looked at within it
_MOST_VALUES = 1 << 24  # of an output: more would take much memory
_MOST_NODES = 20_000  # of a graph
_MOST_BENT = 12
_ZERO = 1e-9  # of the largest
_BUILT_IN = re.compile(r"\w+Backward\d+")
_BENT = frozenset(
    (
        *("Abs", "Relu", "LeakyRelu", "Threshold", "Clamp", "ClampMin", "ClampMax", "Hardtanh"),
        *("Maximum", "Minimum", "SmoothL1Loss", "HuberLoss"),
    )
)
_PAIRS = frozenset(("Cdist", "EuclideanDist", "Pdist"))  # a distance of 0 has no second derivative
_ORDERED = frozenset(("Sort", "Topk", "Kthvalue", "Median", "Nanmedian", "Max", "Min", "Cummax", "Cummin"))


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor with a graph and with rows of samples, which a module has returned.

    Attributes:
        module: its name.
        name: of it, and the place among what it returned.
        edge: where its gradient arrives.
        length: its rows.
        repeats: how many of these each sample has.
        own: whether the module was called with the rows of a tensor of the batch, or of what such a call has given.
    """

    module: str
    name: str
    edge: GradientEdge
    length: int
    repeats: int
    own: bool

    @property
    def is_sure(self) -> bool:
        """Whether its rows are the samples, and not as many by chance."""
        return self.own and self.repeats == 1


class SampleMixing:
    """Looks at what lies between a net's outputs and a loss.

    Args:
        module: the net.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._of_net: deque[_Output] = deque(maxlen=_MOST_OUTPUTS)
        self._of_parts: deque[_Output] = deque(maxlen=_MOST_OUTPUTS)
        self._calls: Counter[str] = Counter()
        self._notes = False
        self._hooked = False  # whether the step has hooks of its own or recomputes, which would run once more
        self._seen: dict[tuple[str, str], int] = {}  # pairs of outputs that seemed mixed -> the samples then

    @contextlib.contextmanager
    def noting(self, batch: Any, rows: int) -> Iterator[None]:
        """While inside, what the net and its parts return is noted.

        Args:
            batch: the step's.
            rows: samples in it.
        """
        self.forget()
        known = {_rows_at(tensor, rows) for tensor in _tensors(batch)} - {None}
        handles = []
        for name, part in self._module.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                note = self._noted(name, rows, known, self._of_parts if name else self._of_net)
                handles.append(part.register_forward_hook(note, with_kwargs=True))
        self._notes = True
        try:
            with self._watching_hooks():
                yield
        finally:
            self._notes = False
            for handle in handles:
                handle.remove()

    def forget(self) -> None:
        """Lets go of what was noted."""
        self._of_net.clear()
        self._of_parts.clear()
        self._calls.clear()
        self._hooked = False

    def found(self, loss: Tensor, rows: int) -> bool:
        """Whether a loss mixes the samples.

        Args:
            loss: with its graph; one number.
            rows: samples that it was computed of.
        """
        if self._hooked or rows <= 1 or loss.grad_fn is None:
            return False
        ends, within = (
            {output.edge: output for output in outputs if output.is_sure or self._calls[output.module] < rows}
            for outputs in (self._of_net, self._of_parts)  # else a loop over the samples, whose rows are something else
        )
        reached = _between(loss.grad_fn, [*ends.values(), *(one for edge, one in within.items() if edge not in ends)])
        parts = [output for output in reached if output.edge not in ends]
        outputs = [output for output in reached if output.edge in ends] or parts[-_LAST:]
        earlier = [output for output in parts if output not in outputs]
        pairs = set[tuple[_Output, _Output]]()
        with contextlib.suppress(RuntimeError), torch.enable_grad():  # not everything can be derived twice
            pairs.update(_bound(loss, outputs))
        with contextlib.suppress(RuntimeError):
            pairs.update(_made_of_several(_nodes_above(loss.grad_fn, outputs), outputs))
        with contextlib.suppress(RuntimeError):
            pairs.update(_fed_by_several(outputs, earlier[:: -(-len(earlier) // _MOST_PARTS) or 1]))
        believed = [self._is_believed(pair, rows) for pair in pairs]  # all of them, which remembers them
        return any(believed)

    def _is_believed(self, pair: tuple[_Output, _Output], rows: int) -> bool:
        """Whether the rows that are mixed are the samples: known, or as many with two sizes of the batch."""
        names = (f"{pair[0].name} {pair[0].repeats}", f"{pair[1].name} {pair[1].repeats}")
        return all(output.is_sure for output in pair) or self._seen.setdefault(names, rows) != rows

    def _noted(self, name: str, rows: int, known: set[Any], notes: deque[_Output]) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
            if not self._notes or torch.compiler.is_compiling():  # a copy of the net has the hook, too
                return
            self._calls[name] += 1
            own = any(_rows_at(tensor, rows) in known for tensor in _tensors((args, kwargs)))
            for place, tensor in enumerate(_tensors(returned)):
                if own and (at := _rows_at(tensor, rows)) is not None:
                    known.add(at)
                if tensor.grad_fn is not None and _has_rows(tensor, rows):
                    edge = GradientEdge(tensor.grad_fn, tensor.output_nr)
                    notes.append(_Output(name, f"{name} {place}", edge, len(tensor), len(tensor) // rows, own))

        return note

    @contextlib.contextmanager
    def _watching_hooks(self) -> Iterator[None]:
        """Notes hooks that the step sets on tensors, and recomputation: looking would call them once more."""
        watched = ((Tensor, "register_hook"), (Tensor, "retain_grad"), (saved_tensors_hooks, "__enter__"))
        with contextlib.ExitStack() as ending:
            for owner, name in watched:
                ending.callback(self._watch(owner, name))
            yield

    def _watch(self, owner: Any, name: str) -> Callable[[], None]:
        """Notes calls of a method on what is no leaf; returns what ends that."""
        called, is_own = getattr(owner, name), name in vars(owner)

        def noted(itself: Any, *args: Any, **kwargs: Any) -> Any:
            self._hooked |= not isinstance(itself, Tensor) or itself.grad_fn is not None
            return called(itself, *args, **kwargs)

        setattr(owner, name, noted)
        return (lambda: setattr(owner, name, called)) if is_own else (lambda: delattr(owner, name))


def _bound(loss: Tensor, outputs: list[_Output]) -> Iterator[tuple[_Output, _Output]]:
    """Yields outputs of which one's row has second derivatives with rows of other samples."""
    edges = [output.edge for output in outputs]
    gradients = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is None or not gradient.requires_grad:
            continue
        for row in {0, output.length // 2}:
            along = torch.zeros_like(gradient)
            along[row] = torch.arange(1, along[row].numel() + 1, device=along.device).cos().view_as(along[row])
            seconds = _gradients_of(gradient, edges, along)
            for other, second in zip(outputs, seconds, strict=True):
                if second is not None and _is_of_several(second, other):
                    yield output, other


def _made_of_several(nodes: list[Any], outputs: list[_Output]) -> Iterator[tuple[_Output, _Output]]:
    """Yields outputs of which several samples' rows meet in a function that is linear in pieces, or in a distance."""
    edges = [output.edge for output in outputs]
    for node in [node for node in nodes if kind_of(node) in _BENT | _ORDERED | _PAIRS][:_MOST_BENT]:
        at = [(node, 0)] if kind_of(node) in _PAIRS else [edge for edge in node.next_functions if edge[0] is not None]
        for edge in at:
            like = edge[0]._input_metadata[edge[1]]
            empty = torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
            for seed in _lines(empty, node) if kind_of(node) in _ORDERED else _elements(empty):
                gradients = _gradients_of(GradientEdge(*edge), edges, seed)
                for output, gradient in zip(outputs, gradients, strict=True):
                    if gradient is not None and _is_of_several(gradient, output):
                        yield output, output


def _fed_by_several(outputs: list[_Output], parts: list[_Output]) -> Iterator[tuple[_Output, _Output]]:
    """Yields outputs of which one row depends on several samples' rows of what a part has returned before."""
    for output in outputs if parts else ():
        like = output.edge.node._input_metadata[output.edge.output_nr]
        for row in {0, output.length // 2}:
            seed = torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
            seed[row] = 1
            edges = [part.edge for part in parts]
            gradients = _gradients_of(output.edge, edges, seed)
            for part, gradient in zip(parts, gradients, strict=True):
                if gradient is not None and _is_of_several(gradient, part):
                    yield output, part


def _gradients_of(output: Tensor | GradientEdge, edges: list[GradientEdge], seed: Tensor) -> tuple[Tensor | None, ...]:
    """As `torch.autograd.grad`, but for its check of the seed's shape, for which it imports sympy: 500 modules."""
    found: tuple[Tensor | None, ...] = _engine_run_backward((output,), (seed,), True, False, tuple(edges), True, False)
    return found


def _elements(empty: Tensor) -> Iterator[Tensor]:
    """Yields a few of single elements; none of a single number, as a limit on the whole loss has it."""
    count = empty.numel()
    for place in sorted({1, count // 2, count - 2, count - 1}) if count > 1 else ():
        seed = empty.clone()
        seed.view(-1)[place] = 1
        yield seed


def _lines(empty: Tensor, node: Any) -> Iterator[Tensor]:
    """Yields the first line along the dimension that a node puts into an order."""
    dim = saved_of(node, "dim")
    if dim is None or not empty.numel() or not empty.ndim:
        return
    dim = signed_of(dim)
    seed = empty.clone()
    seed[tuple(slice(None) if place == dim % empty.ndim else 0 for place in range(empty.ndim))] = 1
    yield seed


def _is_of_several(gradient: Tensor, output: _Output) -> bool:
    """Whether more rows have a gradient than one sample has."""
    if gradient.layout != torch.strided or not gradient.numel():
        return False
    rows = gradient.detach().reshape(output.length, -1).abs().amax(1)
    if not bool(rows.isfinite().all()):
        return False
    return int((rows > _ZERO * rows.max()).sum()) > output.repeats


def _between(root: Any, outputs: list[_Output]) -> list[_Output]:
    """Returns the outputs that a loss is computed from.

    An output is left out where BatchNorm lies between, which mixes samples by its nature, or a function of the user's
    own, whose backward pass may do anything.
    """
    reach, at = _reach(root, outputs)
    hidden = 0
    for node, bits in reach.items():
        hidden |= bits if _is_opaque(node) else 0
    seen = (reach.get(root, 0) | at.get(root, 0)) & ~hidden
    return [output for place, output in enumerate(outputs) if seen >> place & 1]


def _nodes_above(root: Any, outputs: list[_Output]) -> list[Any]:
    """Returns the nodes from a loss down to these outputs."""
    return [node for node, bits in _reach(root, outputs)[0].items() if bits]


def _reach(root: Any, outputs: list[_Output]) -> tuple[dict[Any, int], dict[Any, int]]:
    """Returns for each node bits of the outputs that it was computed from, and of those that it computes."""
    at: dict[Any, int] = {}
    for place, output in enumerate(outputs):
        at[output.edge.node] = at.get(output.edge.node, 0) | 1 << place
    reach: dict[Any, int] = {}
    stack = [(root, False)] if outputs else []
    while stack:
        node, is_done = stack.pop()
        below = nodes_below(node)
        if is_done:
            for one in below:
                reach[node] |= reach[one] | at.get(one, 0)
        elif node not in reach:
            if len(reach) >= _MOST_NODES:
                return {}, {}
            reach[node] = 0
            stack += [(node, True), *((one, False) for one in below if one not in reach)]
    return reach, at


def _is_opaque(node: Any) -> bool:
    name = type(node).__name__
    return "BatchNorm" in name or _BUILT_IN.fullmatch(name) is None


def _has_rows(tensor: Tensor, rows: int) -> bool:
    """Whether the first dimension can be the samples'; not where the second one can be, too."""
    shape = tuple(tensor.shape)
    if tensor.numel() > _MOST_VALUES:
        return False
    return bool(shape) and shape[0] > 0 and shape[0] % rows == 0 and shape[1:2] != (rows,)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _rows_at(tensor: Tensor, rows: int) -> tuple[int, int] | None:
    """Where a tensor's rows are, if it has as many as there are samples: its memory, and the way to the next row."""
    try:
        if tensor.shape[:1] != (rows,):
            return None
        memory = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, nested, fake
        return None
    return (memory, tensor.stride(0)) if memory else None
