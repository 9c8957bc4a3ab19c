"""Whether anybody but backward and the optimizer has changed weights or gradients while micro-batches add up.

Each change through torch raises a tensor's version, which is compared; one through `.data` does not, so that while
this is open, what is taken by `.data` is kept and compared by its values: when a gradient comes, when `.data` is taken
again, and at the end. In the first groups, and then rarely, all are compared by their values too, as a change through
NumPy's view of a tensor has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAREFUL = 2  # first groups in which all values are compared; later in the 4th, 8th, 16th, ...


@dataclass(slots=True)
class _Known:
    """A gradient as backward has left it: the object, its version, and a sum of its values where that is compared."""

    grad: Tensor | None
    version: int
    sums: tuple[int, float] | None


class Untouched:
    """The weights and gradients of one group of micro-batches.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = list(parameters.values())
        self._names = list(parameters)
        self._known: list[_Known | None] = [None] * len(self.parameters)
        self._weights: list[int] = []
        self._sums: list[tuple[int, float]] = []
        self._groups = 0
        self._data = _DataTaken()
        self._ids = {id(parameter) for parameter in self.parameters}
        self._grads: set[int] = set()

    @property
    def careful(self) -> bool:
        """Whether all values are compared."""
        return self._groups <= CAREFUL or self._groups & (self._groups - 1) == 0

    def begin(self) -> None:
        """A group begins: its weights are those of now, and what is done with gradients before backward is free."""
        self._groups += 1
        self._known = [None] * len(self.parameters)
        self._grads.clear()
        self._weights = [parameter._version for parameter in self.parameters]
        self._sums = [_sums(parameter) for parameter in self.parameters] if self.careful else []

    def within(self, active: bool) -> None:
        """A train step begins or ends."""
        self._data.watched = self._is_watched if active else None
        self._data.clear()

    def before(self, number: int) -> str:
        """A gradient comes: returns what was changed of its parameter since the last one, nothing where all is well."""
        parameter, known = self.parameters[number], self._known[number]
        told = "" if known is None else self._gradient_changed(number, known)
        if not told and (parameter._version != self._weights[number] or self._data.is_changed(parameter)):
            told = self._weight(number)
        self._data.forget(parameter.grad)
        return told

    def came(self, number: int) -> None:
        """A gradient has come."""
        grad = self.parameters[number].grad
        if grad is None:
            return
        self._known[number] = _Known(grad, grad._version, _sums(grad) if self.careful else None)
        self._grads.add(id(grad))

    def averaged(self) -> None:
        """The gradients were averaged over the ranks."""
        for number, known in enumerate(self._known):
            if known is not None:
                self.came(number)

    def changed(self) -> str:
        """Returns what was changed, or nothing where all is well."""
        for number, known in enumerate(self._known):
            told = "" if known is None else self._gradient_changed(number, known)
            if told:
                return told
        for number, parameter in enumerate(self.parameters):
            if parameter._version != self._weights[number]:
                return self._weight(number)
        return self._values_changed()

    def _values_changed(self) -> str:
        for tensor in self._data.changed():
            for number, parameter in enumerate(self.parameters):
                if tensor is parameter:
                    return self._weight(number)
            return "changes the gradients after backward()"
        if not self.careful:
            return ""
        for number, (before, parameter) in enumerate(zip(self._sums, self.parameters, strict=True)):
            if before != _sums(parameter):
                return self._weight(number)
        for number, known in enumerate(self._known):
            if known is not None and known.sums is not None and known.sums != _sums(known.grad):
                return self._gradient(number)
        return ""

    def _gradient_changed(self, number: int, known: _Known) -> str:
        grad = self.parameters[number].grad
        if grad is None:
            return f"clears the gradient of {self._names[number]} by itself"
        same = grad is known.grad and known.grad is not None and known.grad._version == known.version
        return "" if same else self._gradient(number)

    def _gradient(self, number: int) -> str:
        return f"changes the gradients after backward() (clips or assigns that of {self._names[number]}?)"

    def _weight(self, number: int) -> str:
        return f"changes the weights by itself ({self._names[number]})"

    def _is_watched(self, tensor: Tensor) -> bool:
        return id(tensor) in self._grads or id(tensor) in self._ids

    def close(self) -> None:
        """Looks away."""
        self._data.close()


class _DataTaken:
    """Keeps a copy of each watched tensor whose `.data` is taken, which may then be changed unseen.

    Attributes:
        watched: which tensors are; None for none.
    """

    def __init__(self) -> None:
        self.watched: Callable[[Tensor], bool] | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._moved: dict[int, Tensor] = {}  # which had other values when their `.data` was taken again
        own: Any = torch._C.TensorBase.data

        def get(tensor: Tensor) -> Tensor:
            self._keep(tensor)
            return own.__get__(tensor)  # type: ignore[no-any-return]

        def put(tensor: Tensor, value: Tensor) -> None:
            self._keep(tensor)
            own.__set__(tensor, value)

        self._property = property(get, put)
        self._before = torch.Tensor.__dict__.get("data")
        torch.Tensor.data = self._property  # type: ignore[assignment]

    def _keep(self, tensor: Tensor) -> None:
        if self.watched is None or not self.watched(tensor):
            return
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor, tensor.detach().clone()
        elif self.is_changed(tensor):  # and may now be put back to what it was
            self._moved[id(tensor)] = tensor

    def changed(self) -> Sequence[Tensor]:
        """Returns those that have other values now, or had them for a while."""
        now = [tensor for tensor, before in self._kept.values() if not _equal(tensor.detach(), before)]
        return [*now, *self._moved.values()]

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether one has other values now."""
        _, before = self._kept.get(id(tensor), (None, None))
        return before is not None and not _equal(tensor.detach(), before)

    def forget(self, tensor: Tensor | None) -> None:
        """Something may rightly change a tensor now."""
        self._kept.pop(id(tensor), None)
        self._moved.pop(id(tensor), None)

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()
        self._moved.clear()

    def close(self) -> None:
        """`.data` is torch's own again."""
        self.watched = None
        if torch.Tensor.__dict__.get("data") is self._property:
            if self._before is None:
                del torch.Tensor.data
            else:
                torch.Tensor.data = self._before


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _sums(tensor: Any) -> tuple[int, float]:
    """Two numbers that differ where the values do, as good as always; waits for the device."""
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    if values.is_complex():
        values = torch.view_as_real(values)
    total = float(values.sum(dtype=torch.float64 if values.device.type != "mps" else torch.float32))
    bits = values if values.device.type != "mps" else values.cpu()
    return int(torch.hash_tensor(bits).view(torch.int64)), total if total == total else 0.0  # noqa: PLR0124 - NaN
