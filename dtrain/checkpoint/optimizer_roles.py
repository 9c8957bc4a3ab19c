"""Which optimizer of a recipe a saved one is, where there are several; and the gradients that wait for their step.

The task's optimizer as it was before the first step is found as that; any other by its kind and its parameters, and
where several have these, by the attribute of the net that it is: `model.second`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.distributed.dtensor import cut_like
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.errors import CheckpointError
from dtrain.model.optimizers import all_optimizers

State = dict[str, Any]
REMEDY = "Create each before training, as an attribute of the model (model.second = ...)."


def role_of(optimizer: Optimizer, engine: Engine) -> State:
    """Returns what tells an optimizer from others that are alike; JSON.

    Raises:
        CheckpointError: nothing does.
    """
    first, at = optimizer is engine.learner.first, attributes_of(optimizer, engine.task.module)
    if not first and not at:
        held = _held(optimizer)
        others = [one for one in all_optimizers() if type(one) is type(optimizer) and one is not engine.learner.first]
        if sum(_held(one) == held for one in others) > 1:
            raise CheckpointError(
                f"there are several {type(optimizer).__qualname__} optimizers of the same parameters, which cannot be "
                f"told apart on resume. {REMEDY}"
            )
    return {"first": first, "at": at}


def _held(optimizer: Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def attributes_of(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Returns the attributes of a net and its parts that an optimizer is, or that hold it, besides `optimizer`."""
    found = []
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            where = f"{path}.{name}".removeprefix(".")
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            if value is optimizer and where != "optimizer":
                found.append(where)
            found += [f"{where}[{key!r}]" for key, item in items if item is optimizer]
    return found


def is_first(saved: Mapping[str, Any], task: Task) -> bool:
    """Whether a saved optimizer is the task's as its recipe makes it."""
    return task.optimizer is not None and bool(saved.get("first", saved["own"]))


def distinguish(alike: list[Optimizer], saved: Mapping[str, Any], task: Task) -> list[Optimizer]:
    """Returns those of several optimizers of the same kind and parameters that may be a saved one."""
    if "first" not in saved:
        return alike  # an older checkpoint
    alike = [one for one in alike if one is not task.optimizer]
    if len(alike) < 2:
        return alike
    return [one for one in alike if set(attributes_of(one, task.module)) & set(saved["at"])]


def use_own(task: Task, optimizers: list[Optimizer], saved: list[State]) -> None:
    """Has the task use the optimizer that was `model.optimizer` when the run was saved."""
    own = next((one for one, was in zip(optimizers, saved, strict=True) if was["own"]), None)
    if own is None or own is task.optimizer:
        return
    if task.optimizer is not None:
        task.module.optimizer = own  # type: ignore[assignment]
    task.optimizer = own


def waiting_gradients(engine: Engine) -> State:
    """Returns the gradients that wait for an optimizer's step, by their parameters' names; mostly there are none."""
    found = engine.learner.steps.waiting.found(engine.learner.optimizers())
    return {name: _parts(grad) if grad.is_sparse else grad for name, grad in found.items()}


def _parts(grad: Tensor) -> State:
    grad = grad.coalesce()
    return {"indices": grad.indices(), "values": grad.values(), "size": list(grad.shape)}


def put_gradients_back(engine: Engine, saved: Mapping[str, Any]) -> None:
    """Has the gradients wait that did so when the run was saved."""
    parameters = dict(engine.task.module.named_parameters())
    found: dict[str, Tensor] = {}
    for name, kept in saved.items():
        grad = (
            kept if isinstance(kept, Tensor) else torch.sparse_coo_tensor(kept["indices"], kept["values"], kept["size"])
        )
        found[name] = cut_like(grad.to(parameters[name].device), parameters[name])
    engine.learner.steps.waiting.put_back(found)
