"""The user's own hooks on parameters: called with the gradient of the whole global batch, as one process calls them.

On several ranks autograd calls them with each rank's own part, where clamping or normalising it is wrong. So they wait
until the gradients are averaged::

    backward() -> autograd comes to a hook: it is noted, and not called
    the end of the backward pass -> the gradients are averaged -> each hook is called with what has come

A hook on a module (`register_full_backward_hook`) gets gradients of its rank's rows. It is called at once, with these
as one process has them: of the mean over the whole batch, not over the rank's part.

That is for hooks of `register_hook` and `register_post_accumulate_grad_hook` on parameters, there before the first
train step or the first call of the model in it; for later ones, from the next comparison of the ranks on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import StepError
from dtrain.model.hooks import can_learn, hook_accumulated

_STAND_IN = "a user's hook that waits"


@dataclass
class _Hooked:
    """A parameter with hooks of the user's own.

    Attributes:
        name: its name.
        parameter: the parameter.
        before: the hooks that may change its gradient, each with the collection that it stands in as long as it is
            wanted, and its key there.
        after: those that are called once the gradient has come.
        waits: whether a gradient has come that they were not called for.
        base: `parameter.grad` as it was before; None for none.
        called: gradients that autograd has computed.
        came: those of them that have come to the parameter.
    """

    name: str
    parameter: Any
    before: list[tuple[Any, int, Callable[[Tensor], Any]]] = field(default_factory=list)
    after: list[tuple[Any, int, Callable[[Tensor], Any]]] = field(default_factory=list)
    waits: bool = False
    base: Tensor | None = None
    called: int = 0
    came: int = 0

    def note(self) -> None:
        """A gradient comes, or will be averaged into this rank's: what is there before it is kept."""
        if not self.waits:
            self.waits = True
            self.base = None if self.parameter.grad is None else self.parameter.grad.detach().clone()

    def call(self) -> None:
        """Calls the hooks with what has come since it was noted."""
        if self.called != self.came:
            raise StepError(
                f"the train step takes a gradient of {self.name} with torch.autograd.grad, and this parameter "
                "has a hook, which on several ranks waits for the averaged gradient, which never comes. "
                "Remove the hook, or set train.average=ddp, which calls hooks with each rank's own gradient."
            )
        base, self.base, self.waits = self.base, None, False
        grad = self.parameter.grad
        if grad is None:
            return
        new = grad.detach() if base is None else grad.detach() - base
        whole, version = new, new._version
        for hook in _wanted(self.before):
            told = hook(new)
            new = new if told is None else told.detach()
        if new is not whole or (base is not None and new._version != version):
            self.parameter.grad = new if base is None else base + new
        for hook in _wanted(self.after):
            hook(self.parameter)


def _wanted(hooks: list[tuple[Any, int, Callable[[Tensor], Any]]]) -> list[Callable[[Tensor], Any]]:
    return [hook for there, key, hook in hooks if key in there]


class GradientHooks:
    """The user's hooks on the parameters of several nets.

    Args:
        active: whether gradients are those of train steps now; else autograd calls the hooks.
        weight: of this rank's loss in the mean over the whole batch, by which one process's gradients are smaller.

    Attributes:
        held: whether they wait for `call_waiting`, since the gradients are not whole once they are averaged.
        counted: whether the loss is a total, whose count is not known yet.
    """

    def __init__(self, active: Callable[[], bool], weight: Callable[[], float]) -> None:
        self.held = self.counted = False
        self._active, self._weight = active, weight
        self._of_modules: list[tuple[Any, int, Any]] = []
        self._hooked: dict[int, _Hooked] = {}
        self._handles: list[Any] = []

    @property
    def first(self) -> str | None:
        """The name of a parameter that has some; None where none has."""
        return next((one.name for one in self._hooked.values()), None)

    def take(self, net: nn.Module) -> bool:
        """Takes the hooks of a net that are not taken yet; returns whether there are any on parameters."""
        found = False
        for path, module in net.named_modules():
            full = module._backward_hooks if module._is_full_backward_hook else {}
            for hooks in (full, module._backward_pre_hooks):
                for key in _own(hooks):
                    self._of_modules.append((hooks, key, hooks[key]))
                    hooks[key] = self._weighted(hooks[key], path)
        for name, parameter in net.named_parameters():
            held: Any = parameter
            collections: Any = (held._backward_hooks, getattr(held, "_post_accumulate_grad_hooks", None))
            if not any(collections) or not can_learn(parameter):
                continue
            before, after = (_own(hooks) for hooks in collections)
            if not before and not after:
                continue
            found = True
            if id(parameter) not in self._hooked:
                self._hooked[id(parameter)] = self._watched(name, parameter)
            one = self._hooked[id(parameter)]
            for hooks, keys, kept in ((collections[0], before, one.before), (collections[1], after, one.after)):
                for key in keys:
                    kept.append((hooks, key, hooks[key]))
                    hooks[key] = self._stand_in(hooks[key])
        return found

    def _watched(self, name: str, parameter: Any) -> _Hooked:
        one = _Hooked(name, parameter)

        def comes(_: Tensor) -> None:
            if self._active():
                one.note()
                one.called += 1

        def came(_: Tensor) -> None:
            one.came += self._active()

        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # without which torch takes no hook
        self._handles.append(parameter.register_hook(comes))
        parameter.requires_grad_(trained)
        self._handles.append(hook_accumulated(parameter, came))
        return one

    def _stand_in(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def waits(tensor: Tensor) -> Any:
            return None if self._active() else hook(tensor)

        return _named_as(waits, hook)

    def _weighted(self, hook: Callable[..., Any], path: str) -> Callable[..., Any]:
        def called(module: nn.Module, *gradients: Any) -> Any:
            weight = self._weight() if self._active() else 1.0
            if weight in (0.0, 1.0) or self.counted:
                told = hook(module, *gradients)
            else:
                told = _times(hook(module, *(_times(part, weight) for part in gradients)), 1 / weight)
            if told is not None and self.counted and self._active():
                raise StepError(
                    f"a backward hook of the module {path or 'model'} changes gradients, and the loss is a "
                    "dtrain.Mean, whose count is not known then. Return the loss as a plain mean."
                )
            return told

        return _named_as(called, hook)

    def note(self, parameters: Iterable[Tensor]) -> list[_Hooked]:
        """Returns those of some parameters, whose gradients are about to be averaged, that have hooks."""
        found = [self._hooked[id(parameter)] for parameter in parameters if id(parameter) in self._hooked]
        for one in found:
            one.note()
        return found

    def call(self, hooked: Iterable[_Hooked]) -> None:
        """Calls the hooks of what `note` returned; the gradients are averaged now."""
        with torch.no_grad():
            for one in () if self.held else hooked:
                one.call()

    def call_waiting(self, *, skipped: bool = False) -> None:
        """Calls the hooks that wait: the gradients are what the optimizer steps on, where that is not skipped."""
        with torch.no_grad():
            for one in self._hooked.values():
                if one.waits and not skipped:
                    one.call()
                one.waits, one.base = False, None

    def close(self) -> None:
        """The hooks are autograd's again; closing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        for one in self._hooked.values():
            self._of_modules += [*one.before, *one.after]
        for hooks, key, hook in self._of_modules:
            if key in hooks:
                hooks[key] = hook
        self._of_modules.clear()
        self._hooked.clear()
        self._handles.clear()


def _times(gradients: Any, factor: float) -> Any:
    if isinstance(gradients, tuple):
        return tuple(_times(part, factor) for part in gradients)
    return None if gradients is None else gradients * factor


def _named_as(stand_in: Callable[..., Any], hook: Any) -> Callable[..., Any]:
    """What else looks at hooks, as accumulation does, sees a user's."""
    stand_in.__module__, stand_in.__qualname__ = getattr(hook, "__module__", None) or "", _STAND_IN
    return stand_in


def _own(hooks: Any) -> list[int]:
    """The keys of the user's hooks: not those of dtrain's functions, or of a list that it appends to."""
    found = {key: hook for key, hook in (hooks or {}).items() if not isinstance(hook, BuiltinFunctionType)}
    return [
        key
        for key, hook in found.items()
        if not str(getattr(hook, "__module__", "")).startswith("dtrain.")
        and getattr(hook, "__qualname__", "") != _STAND_IN
    ]
