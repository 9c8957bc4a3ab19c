"""How a net is called: the inputs of one batch, as the recipe's own step passes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dtrain.errors import UsageError

WEIGHTS_ALONE = "Export the weights alone, to a .safetensors file."


@dataclass(frozen=True)
class ModelCall:
    """One call of a net.

    Attributes:
        args: its inputs by position.
        kwargs: its inputs by name.
        samples: how many the batch has; the first dimension of a tensor that is as long is the batch's.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int

    def is_batched(self, leaf: Any) -> bool:
        """Whether an input is a tensor with a row for each sample."""
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == self.samples

    def rows(self, index: Tensor) -> ModelCall:
        """Returns the call with other rows of the same batch.

        Args:
            index: which, in what order; int64.
        """

        def chosen(leaf: Any) -> Any:
            return leaf[index] if self.is_batched(leaf) else leaf

        return ModelCall(tree_map(chosen, self.args), tree_map(chosen, self.kwargs), len(index))

    def outputs(self, net: Callable[..., Any]) -> Any:
        """Returns what a net returns for it, with the same random numbers each time."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return net(*_own(self.args), **_own(self.kwargs))


def tensors_of(returned: Any) -> list[Tensor]:
    """Returns the tensors of a nested value, in the order in which torch.export flattens it."""
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def checked_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], samples: int | None = None, *, batched: bool = True
) -> ModelCall:
    """Returns a call.

    Args:
        args, kwargs: the inputs.
        samples: how many the batch has; None for the length of the first tensor.
        batched: whether some input has to have a row for each sample.

    Raises:
        UsageError: no input has a row for each sample.
    """
    tensors = [leaf for leaf in tensors_of((args, kwargs)) if leaf.ndim > 0]
    if samples is None and tensors:
        samples = len(tensors[0])
    call = ModelCall(args, kwargs, samples or 0)
    if batched and not any(map(call.is_batched, tensors)):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tensors_of((args, kwargs))) or "no tensors"
        raise UsageError(
            f"the model is called with {shapes}, and no first dimension is that of the batch's "
            f"{'' if samples is None else f'{samples} '}samples. {WEIGHTS_ALONE}"
        )
    return call


def recorded_call(
    net: nn.Module, step: Callable[[], Any], name: str, samples: int | None, *, batched: bool
) -> ModelCall:
    """Runs a step up to the first call of the net, and returns that call.

    Args:
        net: the net.
        step: calls it, or is wrong.
        name: of the step, for the message.
        samples, batched: as for `checked_call`.

    Raises:
        UsageError: the step does not call it.
        Exception: whatever the step raises before.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Seen

    handle = net.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            step()
    except _Seen:
        pass
    finally:
        handle.remove()
    if not seen:
        raise UsageError(
            f"{name} does not call model(...) itself, so it is unknown what the model takes. Define "
            f"predict_step(model, features) in the recipe, which returns model(features). {WEIGHTS_ALONE}"
        )
    return checked_call(*seen[0], samples, batched=batched)


class _Seen(BaseException):
    """Ends a step once the call is known; no `except Exception` of the step's keeps it going."""


def _own(nested: Any) -> Any:
    """The same nesting anew, so that a net that changes a dict of its inputs changes nothing else."""
    leaves, spec = tree_flatten(nested)
    return tree_unflatten(leaves, spec)
