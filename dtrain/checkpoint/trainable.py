"""What training itself changes of the task: which parameters learn, and which the optimizers hold, group by group.

A recipe builds the task as it was at the run's beginning. A run that is resumed is brought from there to where it was:
parameters that were frozen or unfrozen since, groups that were added (`add_param_group`). What differs from the
beginning itself is another recipe's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.data.loader_group import train_splits
from dtrain.engine.loop import Engine
from dtrain.engine.valid_loaders import by_name, split_of
from dtrain.errors import CheckpointError
from dtrain.model.attributes import attributes_of
from dtrain.model.optimizers import optimizers_holding

State = dict[str, Any]
Holds = list[list[str]]


@dataclass(frozen=True)
class InitialTask:
    """A task as its recipe builds it.

    Attributes:
        lengths: the numbers of samples and batches, of what has a length.
        learns: name of each parameter -> whether it learns.
        holds: the optimizers, and the names of their parameters.
    """

    lengths: dict[str, int]
    learns: dict[str, bool]
    holds: list[tuple[Optimizer, Holds]]


def beginning_of(engine: Engine) -> InitialTask:
    """Returns what an engine's task was when this was first asked, which is before it trains or takes up a run."""
    if engine.began is None:
        module = engine.task.module
        engine.began = InitialTask(
            _lengths(engine),
            {name: parameter.requires_grad for name, parameter in module.named_parameters()},
            [(optimizer, holds(optimizer, module)) for optimizer in _optimizers(engine)],
        )
    began: InitialTask = engine.began
    return began


def _optimizers(engine: Engine) -> list[Optimizer]:
    """Returns the task's optimizer and those on the net; where there is none, all that hold its parameters."""
    module, own = engine.task.module, engine.task.optimizer
    found = [thing for thing in (own, *attributes_of(module).values()) if isinstance(thing, Optimizer)]
    return found or optimizers_holding({id(parameter) for parameter in module.parameters()})


def _lengths(engine: Engine) -> dict[str, int]:
    found: dict[str, int] = {}
    valid = {split_of(name): loader for name, loader in by_name(engine.task.dl_valid).items()}
    for split, loader in {**train_splits(engine.task.dl_train), **valid}.items():
        for what, sized in (("samples", getattr(loader, "dataset", None)), ("batches", loader)):
            with contextlib.suppress(TypeError):  # what has no length
                found[f"{split} {what}"] = len(sized)  # type: ignore[arg-type]
    return found


def holds(optimizer: Optimizer, module: nn.Module) -> Holds:
    """Returns the names of an optimizer's parameters, group by group; shapes, of those that are not the net's."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in group["params"]]
        for group in optimizer.param_groups
    ]


def held_at_first(engine: Engine, optimizer: Optimizer) -> Holds:
    """Returns what an optimizer held at the beginning; what it holds, where it came later."""
    known = next((held for one, held in beginning_of(engine).holds if one is optimizer), None)
    return holds(optimizer, engine.task.module) if known is None else known


def changed_learning(engine: Engine) -> dict[str, bool]:
    """Returns whether they learn of the parameters for which this has changed since the beginning, by name."""
    learnt = beginning_of(engine).learns
    now = {name: parameter.requires_grad for name, parameter in engine.task.module.named_parameters()}
    return {name: learns for name, learns in now.items() if learnt.get(name, learns) != learns}


def set_learning(module: nn.Module, learns: Mapping[str, bool]) -> None:
    """Has parameters learn, or not, as `changed_learning` returned."""
    for name, parameter in module.named_parameters():
        if name in learns:
            parameter.requires_grad_(learns[name])


def regroup(optimizer: Optimizer, saved: Holds, module: nn.Module) -> None:
    """Has an optimizer hold the parameters that it was saved with; the groups' options are loaded besides.

    Raises:
        CheckpointError: it held some that are not the net's.
    """
    if holds(optimizer, module) == saved:
        return
    parameters = dict(module.named_parameters())
    foreign = [name for group in saved for name in group if name not in parameters]
    if foreign:
        raise CheckpointError(
            f"the optimizer ({type(optimizer).__qualname__}) got new parameters during training, and one of them, "
            f"{foreign[0]}, is not part of the model, so it cannot be restored. Make it part of the model."
        )
    groups = [{**group, "params": []} for group in optimizer.param_groups[: len(saved)]]
    groups += [{**optimizer.defaults, "params": []} for _ in saved[len(groups) :]]
    for group, names in zip(groups, saved, strict=True):
        group["params"] = [parameters[name] for name in names]
    optimizer.param_groups[:] = groups
