"""The step contract: how a user's step is called, what it may return, and which kind it is.

A batch that is a tuple or list is unpacked: ``train_step(model, *batch)``; any other batch is one argument.
A step returns ``(loss, metric)``, a loss alone, or a mapping name -> value. Where a torchmetrics object has a value's
name, the value is what that object is updated with, such as ``(predictions, labels)``.

Two kinds of train step are told apart by what they do on the first batch:

- *imperative*: it calls ``backward()`` and ``optimizer.step()`` itself and returns values;
- *declarative*: it returns a loss that still has its graph; the engine does the rest.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dtrain.distributed.dtensor import is_sharded
from dtrain.engine.metrics import Mean, Observed, Value
from dtrain.errors import StepError
from dtrain.model.hooks import can_learn, hook_gradient, scaled
from dtrain.rundir.columns import NO_METRICS, VALID

Step = Callable[..., Any]
Kind = Literal["imperative", "declarative"]

_LOST_STEPS = 100  # a scale of float16's own that is far too large costs some tens
_BY_HAND = "A step that moves the weights itself does so through an optimizer, such as torch.optim.SGD."
HOW_TO_LEARN = (
    "Either call model.optimizer.zero_grad(), loss.backward() and model.optimizer.step() in the step, "
    "or return the loss with its graph (without .item() or .detach()) and dtrain does all three."
)


def call_step(step: Step, model: nn.Module, batch: Any) -> Any:
    """Calls a step with a batch, unpacked where the batch is a tuple or list."""
    if isinstance(batch, (tuple, list)):
        return step(model, *batch)
    return step(model, batch)


class StepValues:
    """Gives the values that the steps of one split return their names, and checks them.

    Args:
        model: its `metric_name`, where it has one, names the metric of a pair; None where there is no model.
        split: "train" or "valid", for messages.
        metrics: names of the torchmetrics objects; a value of such a name is the tuple or mapping of arguments of
            the object's `update`, or its one argument.
    """

    def __init__(self, model: Any, split: str, metrics: Container[str] = ()) -> None:
        self._model = model
        self._split = split
        self._metrics = metrics
        self._metric_name = ""

    def __call__(self, returned: Any) -> dict[str, Value]:
        """Returns name -> value.

        Args:
            returned: `(loss, metric)`, a loss, or a mapping name -> value; a value is a float, a tensor of one
                element or a `dtrain.Mean`.

        Raises:
            StepError: the step returned nothing, or something that is no such value.
        """
        values = self._named(returned)
        for name, value in values.items():
            if type(value) is Tensor and value.ndim == 0 and value.is_floating_point() and not self._metrics:
                continue  # as most are, at every step
            values[name] = observed(value) if name in self._metrics else _checked(name, value, self._split)
        return values

    def _named(self, returned: Any) -> dict[str, Any]:
        if type(returned) is tuple and len(returned) == 2 and self._metric_name:
            return {"loss": returned[0], self._metric_name: returned[1]}
        if isinstance(returned, (tuple, list)) and len(returned) == 2:
            self._metric_name = self._metric_name or _check_name(metric_name(self._model), self._split)
            return {"loss": returned[0], self._metric_name: returned[1]}
        if isinstance(returned, Mapping) and returned:
            for name in returned:
                _check_name(name, self._split)
            return dict(returned)
        if isinstance(returned, (float, int, Tensor, Mean)) or getattr(returned, "shape", None) == ():
            return {"loss": returned}
        raise StepError(_no_values(returned, self._split))


def observed(value: Any) -> Observed:
    """Returns what a torchmetrics object is to be updated with, without its graph."""
    if isinstance(value, Mapping):
        return Observed((), {str(key): _without_graph(part) for key, part in value.items()})
    return Observed(tuple(_without_graph(part) for part in (value if isinstance(value, (tuple, list)) else (value,))))


def _without_graph(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


def metric_name(model: Any) -> str:
    """Returns the name of a pair's second value: the model's `metric_name`, else "metric"."""
    name = str(getattr(model, "metric_name", None) or "metric")
    if name == "loss":
        raise StepError('model.metric_name is "loss", which is the name of the other value. Choose another name.')
    return name


def _check_name(name: Any, split: str) -> str:
    if not isinstance(name, str) or not name:
        raise StepError(f"the {split} step returned a mapping with the key {name!r}. Use strings as names.")
    if not name.isprintable():
        raise StepError(
            f"the {split} step returned a value named {name!r}, which contains a line break or another control "
            "character. The name becomes a column of the history: use printable characters."
        )
    if name in NO_METRICS or name.startswith(VALID):
        raise StepError(
            f"the {split} step returned a value named {name!r}, which is reserved for a column of dtrain "
            f"({', '.join(NO_METRICS)}, {VALID}...). Choose another name."
        )
    return name


def _checked(name: str, value: Any, split: str) -> Value:
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.dtype.is_floating_point:
            return value
        if value.numel() != 1 or value.is_complex():
            raise StepError(
                f"the {split} step returned {name!r} as a tensor of shape {tuple(value.shape)} and type {value.dtype}; "
                "a value should be one real number. Return its mean, as in value.mean(), or dtrain.Mean(total, count)."
            )
        return value if value.ndim == 0 else value.reshape(())
    if isinstance(value, (float, int, Mean)):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return float(value)  # a NumPy scalar
    raise StepError(
        f"the {split} step returned {name!r} as {_shown(value)}; "
        "a value should be a float, a tensor with one element, or dtrain.Mean(total, count); for a tuple of update "
        "arguments, return a torchmetrics object of this name from build_metrics()."
    )


def _no_values(returned: Any, split: str) -> str:
    what = "nothing (None)" if returned is None else _shown(returned)
    return (
        f"the {split} step returned {what}. Return (loss, metric), the loss alone, "
        "or a mapping such as {'loss': loss, 'accuracy': accuracy}."
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} values"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{f' of shape {tuple(shape)}' if shape else ''}"


@contextlib.contextmanager
def watch_backward(module: nn.Module) -> Iterator[tuple[list[Tensor], Callable[[], bool]]]:
    """Watches whether a gradient reaches a parameter.

    Yields:
        the parameters that one reached, empty until then; and a function that tells whether a gradient was
        changed in place after it had arrived.
    """
    seen: list[Tensor] = []
    versions: dict[int, int] = {}

    def arrived(parameter: Tensor) -> None:
        seen.append(parameter)
        versions[id(parameter)] = -1 if parameter.grad is None else parameter.grad._version

    def touched() -> bool:
        changed = any(p.grad is not None and p.grad._version != versions[id(p)] for p in seen)
        return changed or (watch is not None and watch.touched)

    handles = [_hooks(p).register_post_accumulate_grad_hook(arrived) for p in module.parameters() if p.requires_grad]
    watch = _InPlace(module) if any(is_sharded(p) for p in module.parameters()) else None
    try:
        with watch or contextlib.nullcontext():
            yield seen, touched
    finally:
        for handle in handles:
            handle.remove()


class _InPlace(TorchFunctionMode):
    """Notes functions that change a gradient in place; of sharded ones torch does not count the versions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = list(module.parameters())
        self.touched = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_backward = torch._C._current_graph_task_id() != -1
        if name.endswith("_") and not name.endswith("__") and args and not in_backward:
            changed = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            gradients = {id(parameter.grad) for parameter in self._parameters if parameter.grad is not None}
            self.touched |= any(id(one) in gradients for one in changed)
        return func(*args, **(kwargs or {}))


def kind_of(stepped: bool, backward: bool, values: Mapping[str, Value]) -> Kind | None:
    """Tells the kind of a train step from what it has done for a batch.

    Args:
        stepped: whether an optimizer stepped in it.
        backward: whether a gradient reached a parameter in it.
        values: what it returned, by name.

    Returns:
        the kind; None where it has learnt nothing from the batch, which it may have left out.

    Raises:
        StepError: it returned something to learn from, and not as its loss.
    """
    if stepped or backward:
        return "imperative"
    if has_graph(values.get("loss")):
        return "declarative"
    if "loss" not in values and any(has_graph(value) for value in values.values()):
        raise missing_loss(values)
    return None


def missing_loss(values: Mapping[str, Value]) -> StepError:
    """Returns the error for a train step that leaves the learning to dtrain, and names no value "loss"."""
    close = difflib.get_close_matches("loss", values, n=1)
    return StepError(
        f"the train step returned {', '.join(map(repr, values))}, and no value named 'loss', on which dtrain could "
        f"call backward(). {f'Is {close[0]!r} a typo? ' if close else ''}Return it as {{'loss': loss, ...}}."
    )


def never_learns(values: Mapping[str, Value], batches: int, *, accumulates: bool = False) -> StepError:
    """Returns the error for a train step that has learnt nothing from its first batches.

    Args:
        values: what it returned for the last one.
        batches: how many there were.
        accumulates: whether several make one optimizer step, so that none may be left out.
    """
    first = "its first batch" if batches == 1 else f"its first {batches} batches"
    no_loss = "" if "loss" in values else f" (it returned {', '.join(map(repr, values))}, and no value named 'loss')"
    skips = " To skip a batch, return its loss as dtrain.Mean(0 * total, 0)." if accumulates else ""
    return StepError(
        f"the train step does not train: for {first} it called neither loss.backward() nor optimizer.step(), and "
        f"the returned loss has no graph{no_loss}. {HOW_TO_LEARN} {_BY_HAND}{skips}"
    )


def never_steps(within: str) -> StepError:
    """Returns the error for a train step that only computes gradients.

    Args:
        within: how long it was waited for a step, such as "the whole epoch".
    """
    return StepError(
        f"the train step calls backward(), but no optimizer's step() ran in {within}: nothing is trained. "
        f"{HOW_TO_LEARN} {_BY_HAND}"
    )


class LostGradients:
    """Counts the train steps in a row whose gradients were cleared, and not kept for a later optimizer step.

    Args:
        module: the net.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._last: Tensor | None = None
        self._count = 0

    def __call__(self, *, cleared: bool = False) -> int:
        """Looks at the gradients after a train step that no optimizer has stepped in, and returns the count.

        Args:
            cleared: whether they are known to be cleared anyway.
        """
        # What adds up stays the same object; one that was cleared is made anew.
        now = next((p.grad for p in self._module.parameters() if p.grad is not None), None)
        self._count = self._count + 1 if cleared or now is None or now is not self._last else 0
        self._last = now
        return self._count

    def expect_step(self) -> None:
        """Ends, long before a long epoch does, what only computes gradients.

        Raises:
            StepError: no optimizer has stepped in so many train steps, and the gradients of each were cleared.
        """
        lost = self()
        if lost >= _LOST_STEPS:
            raise never_steps(f"{lost} train steps")


def has_graph(loss: Value | Observed | None) -> bool:
    """Whether backward() can be called on a loss."""
    total = loss.total if isinstance(loss, Mean) else loss
    return isinstance(total, Tensor) and total.requires_grad


def scaled_gradients(parameters: Iterable[Tensor], scale: float) -> AbstractContextManager[None]:
    """Multiplies every gradient on its way into `param.grad` by a number.

    This is how a step, also one that calls backward() itself, gets the weight of its real samples: the hooks
    run before DDP averages over the ranks. Costs nothing where the scale is 1.
    """
    return _AS_THEY_ARE if scale == 1.0 else _scaled(parameters, scale)


_AS_THEY_ARE = contextlib.nullcontext()


@contextlib.contextmanager
def _scaled(parameters: Iterable[Tensor], scale: float) -> Iterator[None]:
    # Frozen ones too, which the step may unfreeze.
    handles = [hook_gradient(p, lambda grad: scaled(grad, scale)) for p in parameters if can_learn(p)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def no_grad_step(step: Step, module: nn.Module, batch: Any) -> Any:
    """Calls a valid step without recording gradients, whether or not it says so itself."""
    with torch.no_grad():
        return call_step(step, module, batch)


def _hooks(parameter: Any) -> Any:
    """A parameter whose methods torch has not typed."""
    return parameter
