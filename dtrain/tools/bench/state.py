"""What a trial may change, kept as it was, and put back: net, optimizers, schedules, random streams, loaders."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.data.sources import Sources
from dtrain.distributed.seeding import load_random_state, random_state
from dtrain.engine.train_step import Task


class KeptState:
    """A task's state as it is now.

    Args:
        task: the user's objects.
        optimizers: all that step in it.
        device: the rank's.
    """

    def __init__(self, task: Task, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        self._task, self._device = task, device
        module = task.module
        self._forward = module.__dict__.get("forward")
        self._modes = [(part, part.training) for part in module.modules()]
        self._parameters = [
            (p, p.data, p.detach().clone(), p.requires_grad, p.grad, _copy(p.grad)) for p in module.parameters()
        ]
        self._buffers = [
            (part._buffers, name, buffer, buffer.detach().clone())
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._optimizer = getattr(module, "optimizer", None)
        self._optimizers = [_KeptOptimizer(one) for one in optimizers]
        stateful = [task.scheduler, *task.others.values()]
        self._states = [(one, copy.deepcopy(one.state_dict())) for one in stateful if _has_state(one)]
        self._sources = Sources(task.dl_train)
        self._loaders = self._sources.states()
        self._random = random_state(device)

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything is as it was, in the memory where it was."""
        module = self._task.module
        if module.__dict__.get("forward") is not self._forward:  # an engine that could not be made
            module.__dict__.pop("forward")
            module.__dict__ |= {} if self._forward is None else {"forward": self._forward}
        for part, training in self._modes:
            part.training = training
        for parameter, data, values, learns, grad, grad_values in self._parameters:
            parameter.data = data  # a trial may have laid it out otherwise
            data.copy_(values)
            parameter.requires_grad_(learns)
            parameter.grad = grad
            if grad is not None and grad_values is not None:
                grad.copy_(grad_values)
        for buffers, name, buffer, values in self._buffers:
            buffers[name] = buffer
            buffer.copy_(values)
        if getattr(module, "optimizer", None) is not self._optimizer:
            module.optimizer = self._optimizer  # type: ignore[assignment]
        for optimizer in self._optimizers:
            optimizer.put_back()
        for one, state in self._states:
            one.load_state_dict(copy.deepcopy(state))
        self._sources.load(self._loaders)
        load_random_state(self._random, self._device)


class _KeptOptimizer:
    """An optimizer's groups and states, with the tensors that they are in."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [{key: _copied(value) for key, value in g.items()} for g in optimizer.param_groups]
        self._state = {key: _copied(value) for key, value in optimizer.state.items()}

    def put_back(self) -> None:
        optimizer = self._optimizer
        for group, kept in zip(optimizer.param_groups, self._groups, strict=True):
            group.clear()
            group.update({key: _restored(value) for key, value in kept.items()})
        optimizer.state.clear()
        optimizer.state.update({key: _restored(value) for key, value in self._state.items()})


class _KeptTensor:
    """A tensor, and what was in it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.values = tensor, tensor.detach().clone()


def _copied(value: Any) -> Any:
    """A tree with its tensors kept; parameters are kept elsewhere."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return _KeptTensor(value)
    if type(value) in (dict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        copies = {key: _copied(part) for key, part in items}
        return copies if isinstance(value, dict) else type(value)(copies.values())
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - an object of the optimizer's own, which is then the same one
        return value


def _restored(value: Any) -> Any:
    if isinstance(value, _KeptTensor):
        value.tensor.detach().copy_(value.values)
        return value.tensor
    if type(value) is dict:
        return {key: _restored(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_restored(part) for part in value)
    return value


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _has_state(thing: Any) -> bool:
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))
