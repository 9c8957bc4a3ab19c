"""The optimizer of a captured step: its counts of steps and its learning rates are on the device.

What the user and a schedule see of the optimizer stays as it is: only while it steps, `capturable` is set, which has
torch count the steps on the device, and the learning rates are tensors there, which are written before a step whose
rate is another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim import optimizer as torch_optimizer

from dtrain.errors import UsageError

_WITH_RATE = (Adam, AdamW)  # which read the learning rate on the device, in each of their implementations
_CAPTURABLE = (*_WITH_RATE, RMSprop)
OFF = "or set train.cuda_graph=false."
_HOOKED = (
    "dtrain.engine.step_counter",
    "dtrain.engine.accumulation",
    "dtrain.model.",
    "torch.profiler",
)  # which replays heed


class GraphOptimizer:
    """An optimizer whose steps can be captured.

    Args:
        optimizer: the task's.
        device: the rank's.

    Raises:
        UsageError: its steps cannot be captured.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        check_capturable(optimizer)
        self.optimizer = optimizer
        self._device = device
        self._counts = isinstance(optimizer, _CAPTURABLE)
        self._rates: list[Tensor | None] = []
        self._written: list[float | None] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the optimizer steps as in a graph."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group.get("capturable")) for group in groups]
        self.write()
        self._place_counts()
        # torch warns of `capturable` outside of a graph, as it is while a step warms up.
        self.optimizer._warned_capturable_if_run_uncaptured = True
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = group["lr"] if rate is None else rate
            if self._counts:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"] = rate
                if self._counts:
                    group["capturable"] = capturable

    def write(self) -> None:
        """Writes the learning rates to the device that have changed."""
        for number, group in enumerate(self.optimizer.param_groups):
            if number == len(self._rates):
                reads = isinstance(self.optimizer, _WITH_RATE) or group.get("fused")
                self._rates.append(torch.zeros((), dtype=torch.float32, device=self._device) if reads else None)
                self._written.append(None)
            tensor, rate = self._rates[number], group["lr"]
            if tensor is not None and rate != self._written[number]:
                tensor.fill_(rate)
                self._written[number] = rate

    def fixed(self) -> dict[str, Any]:
        """Returns the options by name that a graph keeps as they are now."""
        found: dict[str, Any] = {"state": id(self.optimizer.state)}
        for number, group in enumerate(self.optimizer.param_groups):
            for name, value in group.items():
                if name != "params" and (name != "lr" or not self._written_by_us(number)):
                    found[f"{name} of group {number}"] = value
            found[f"parameters of group {number}"] = len(group["params"])
        return found

    def _written_by_us(self, number: int) -> bool:
        return number < len(self._rates) and self._rates[number] is not None

    def _place_counts(self) -> None:
        """Counts of steps that a checkpoint, or steps without a graph, have on the CPU, are moved to the device."""
        if self._counts:
            self._move_counts(self._device)

    def close(self) -> None:
        """Has the counts of steps where torch has them without a graph."""
        if self._counts:
            self._move_counts(torch.device("cpu"))

    def _move_counts(self, device: torch.device) -> None:
        for group in self.optimizer.param_groups:
            if device.type == "cpu" and (group.get("fused") or group.get("capturable")):
                continue
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                count = state.get("step")
                if isinstance(count, Tensor) and count.device.type != device.type:
                    state["step"] = count.to(device)


def check_capturable(optimizer: Optimizer) -> None:
    """Whether the steps of an optimizer can be captured.

    Raises:
        UsageError: they cannot, or it is not known.
    """
    kind = type(optimizer).__name__
    step = optimizer.__dict__.get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise UsageError(f"train.cuda_graph: {kind}.step was replaced, and a graph would not call it. Leave it, {OFF}")
    if type(optimizer) not in (SGD, *_CAPTURABLE):
        names = ", ".join(sorted(one.__name__ for one in (SGD, *_CAPTURABLE)))
        raise UsageError(
            f"train.cuda_graph: {kind} is not known to be capturable. Use one of torch.optim's {names}, {OFF}"
        )
    for group in optimizer.param_groups:
        tensors = [name for name, value in group.items() if isinstance(value, Tensor)]
        if tensors or group.get("differentiable"):
            name = tensors[0] if tensors else "differentiable"
            raise UsageError(
                f"train.cuda_graph: {kind} has {name} = {group[name]}. Give it a number (dtrain itself has a graph "
                f"read the learning rate from the device), {OFF}"
                if tensors
                else f"train.cuda_graph: {kind} has differentiable=True, which no graph can have. Remove it, {OFF}"
            )


def check_hooks(optimizer: Optimizer) -> None:
    """Whether all that is called at an optimizer's steps is known to be called, or captured, with a graph, too.

    Raises:
        UsageError: there is a hook of the user's, or of `train.log_norms`.
    """
    everywhere = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    for hook in (hook for hooks in (*everywhere, *own) for hook in hooks.values()):
        module = str(getattr(hook, "__module__", ""))
        if module == "dtrain.callbacks.param_norms":
            raise UsageError(
                f"train.cuda_graph: train.log_norms looks at the gradients before each step of the optimizer, which a "
                f"graph does not stop at. Remove train.log_norms, {OFF}"
            )
        if not module.startswith(_HOOKED):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise UsageError(
                f"train.cuda_graph: {name} ({module}) is registered as a hook of optimizer steps, and a graph would "
                f"not call it. Use a callback's on_optimizer_step, {OFF}"
            )
