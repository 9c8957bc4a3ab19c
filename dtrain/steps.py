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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain.errors import StepError
from dtrain.metrics import Mean, Observed, Value

Step = Callable[..., Any]
Kind = Literal["imperative", "declarative"]

# Columns of the history that are dtrain's.
RESERVED = ("epoch", "lr", "seconds", "samples_per_second")

HOW_TO_LEARN = (
    "Either call model.optimizer.zero_grad(), loss.backward() and model.optimizer.step() in the step, "
    "or return the loss with its graph (without .item() or .detach()) and dtrain does these three."
)


def call_step(step: Step, model: nn.Module, batch: Any) -> Any:
    """Calls a step with a batch, unpacked where the batch is a tuple or list."""
    if isinstance(batch, (tuple, list)):
        return step(model, *batch)
    return step(model, batch)


def named_values(returned: Any, model: Any, split: str, metrics: Container[str] = ()) -> dict[str, Value]:
    """Gives the values that a step returned their names, and checks them.

    Args:
        returned: `(loss, metric)`, a loss, or a mapping name -> value; a value is a float, a 0-d tensor
            or a `dtrain.Mean`.
        model: its `metric_name`, where it has one, names the metric of a pair.
        split: "train" or "valid", for messages.
        metrics: names of the torchmetrics objects; a value of such a name is the tuple or mapping of arguments of
            the object's `update`, or its one argument.

    Raises:
        StepError: the step returned nothing, or something that is no such value.
    """
    if isinstance(returned, Mapping):
        values = dict(returned)
    elif isinstance(returned, (tuple, list)) and len(returned) == 2:
        values = {"loss": returned[0], metric_name(model): returned[1]}
    elif isinstance(returned, (float, int, Tensor, Mean)) or getattr(returned, "shape", None) == ():
        values = {"loss": returned}
    else:
        raise StepError(_no_values(returned, split))
    if not values:
        raise StepError(_no_values(returned, split))
    return {
        _name(name, split): observed(value) if name in metrics else _checked(name, value, split)
        for name, value in values.items()
    }


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
        raise StepError('model.metric_name is "loss", which is the name of the other value. Choose another.')
    return name


def _name(name: Any, split: str) -> str:
    if not isinstance(name, str) or not name:
        raise StepError(f"the {split} step returned a mapping with the key {name!r}. Name its values by text.")
    if name in RESERVED or name.startswith("val_"):
        raise StepError(
            f"the {split} step returned a value named {name!r}, which is the name of a column of dtrain's own "
            f"({', '.join(RESERVED)}, val_...). Choose another."
        )
    return name


def _checked(name: str, value: Any, split: str) -> Value:
    if type(value) is float or isinstance(value, (Mean, int, float)):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise StepError(
                f"the {split} step returned {name!r} as a tensor of shape {tuple(value.shape)} and type {value.dtype}; "
                "a value is one real number. Return its mean, as in value.mean(), or dtrain.Mean(total, count)."
            )
        return value if value.ndim == 0 else value.reshape(())
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return float(value)  # a NumPy scalar
    raise StepError(
        f"the {split} step returned {name!r} as {_shown(value)}; "
        "a value is a float, a tensor with one element, or dtrain.Mean(total, count); or build_metrics() returns a "
        "torchmetrics object of this name, for a tuple of its update's arguments."
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


class OptimizerWitness:
    """Notes which optimizers step, whoever made them, until it is closed.

    Attributes:
        optimizers: those whose step() ran, each once, in the order of their first run.
    """

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self._handle = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if not any(optimizer is known for known in self.optimizers):
            self.optimizers.append(optimizer)

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        self._handle.remove()


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
        return any(p.grad is not None and p.grad._version != versions[id(p)] for p in seen)

    handles = [_hooks(p).register_post_accumulate_grad_hook(arrived) for p in module.parameters() if p.requires_grad]
    try:
        yield seen, touched
    finally:
        for handle in handles:
            handle.remove()


def kind_of(stepped: bool, backward: bool, loss: Value | None) -> Kind:
    """Tells the kind of a train step from its first call.

    Args:
        stepped: whether an optimizer stepped in it.
        backward: whether a gradient reached a parameter in it.
        loss: what it returned as its loss, if it did.

    Raises:
        StepError: nothing would ever be learnt.
    """
    if stepped or backward:
        return "imperative"
    if has_graph(loss):
        return "declarative"
    raise StepError(
        "the train step never learns: it called neither loss.backward() nor optimizer.step(), "
        f"and the loss that it returned has no graph. {HOW_TO_LEARN}"
    )


def has_graph(loss: Value | None) -> bool:
    """Whether backward() can be called on a loss."""
    total = loss.total if isinstance(loss, Mean) else loss
    return isinstance(total, Tensor) and total.requires_grad


@contextlib.contextmanager
def scaled_gradients(parameters: Iterable[Tensor], scale: float) -> Iterator[None]:
    """Multiplies every gradient on its way into `param.grad` by a number.

    This is how a step, also one that calls backward() itself, gets the weight of its real samples: the hooks
    run before DDP averages over the ranks. Costs nothing where the scale is 1.
    """
    if scale == 1.0:
        yield
        return
    handles = [_hooks(p).register_hook(lambda grad: grad * scale) for p in parameters if p.requires_grad]
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
