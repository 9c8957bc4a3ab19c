"""The state of a script's run: of its objects and loaders, taken for a checkpoint and put back from one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.api.prepared import PreparedLoader
from dtrain.checkpoint.contents import GlobalState
from dtrain.checkpoint.extra import extra_metadata, load_extra
from dtrain.checkpoint.state import load_buffers, load_optimizer, other_buffers
from dtrain.checkpoint.tree import flatten
from dtrain.checkpoint.weights import WEIGHTS, check_fit
from dtrain.errors import UsageError

State = dict[str, Any]


@dataclass
class Objects:
    """What a script has given to its run, by kind; the first net is the one whose weights are found by others.

    Attributes:
        nets: at least one.
        optimizers: of them.
        others: whatever else has a state: a scheduler, an average of the weights.
    """

    nets: list[nn.Module] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, given: Sequence[Any]) -> Objects:
        """Sorts a call's arguments.

        Raises:
            UsageError: one has no state, or there is no net.
        """
        found = cls()
        for number, thing in enumerate(given, start=2):
            if isinstance(thing, nn.Module):
                found.nets.append(thing)
            elif isinstance(thing, Optimizer):
                found.optimizers.append(thing)
            elif isinstance(thing, PreparedLoader):
                raise UsageError(f"argument {number} of dtrain.run is a loader: it knows those that were prepared.")
            elif all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict")):
                found.others.append(thing)
            else:
                raise UsageError(
                    f"argument {number} of dtrain.run is a {type(thing).__name__}, which has no state_dict() and "
                    "load_state_dict(): pass nets, optimizers, schedulers and the like."
                )
        if not found.nets:
            raise UsageError("dtrain.run got no model: pass it first, dtrain.run('runs/first', model, optimizer).")
        return found

    def state(self) -> State:
        """Returns what is the same on all ranks, but for the first net's weights."""
        return {
            "nets": [dict(net.state_dict()) for net in self.nets[1:]],
            "buffers": [other_buffers(net) for net in self.nets],
            "optimizers": [_kept(one) for one in self.optimizers],
            "others": [_kept(one) for one in self.others],
            "training": [[part.training for part in net.modules()] for net in self.nets],
        }

    def whole(self, state: State, rows: Mapping[str, bytes]) -> GlobalState:
        """Returns a state as a checkpoint's files have it."""
        structure, tensors = flatten(state, "state")
        first = self.nets[0].state_dict()
        named = {f"{WEIGHTS}:{name}": value.detach() for name, value in first.items() if isinstance(value, Tensor)}
        plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in (named | tensors).items()}
        return GlobalState(structure, plain, extra_metadata(first), dict(rows))

    def check(self, state: State, where: str) -> None:
        """Compares a saved state with the objects.

        Raises:
            UsageError: it is that of others; the first that differs is named.
        """
        for what, things in (("optimizers", self.optimizers), ("others", self.others)):
            there, here = [one["kind"] for one in state[what]], [type(one).__qualname__ for one in things]
            if there != here:
                named = "optimizers" if what == "optimizers" else "schedulers and other objects"
                raise UsageError(
                    f"{where} does not match: the {named} were {', '.join(there) or 'none'} and are "
                    f"{', '.join(here) or 'none'}. Pass dtrain.run the same ones, or choose another folder."
                )
        if len(state["nets"]) != len(self.nets) - 1:
            raise UsageError(f"{where} does not match: it has {len(state['nets']) + 1} models, not {len(self.nets)}.")
        for number, (net, saved) in enumerate(zip(self.nets[1:], state["nets"], strict=True), start=2):
            check_fit(net, saved, f"{where} (model {number})")

    def waiting(self, stepped: Collection[int]) -> State:
        """Returns the gradients that wait for an optimizer's step, of a group of batches that is not over.

        Args:
            stepped: ids of the optimizers that have stepped with the last batch.
        """
        held = {
            id(parameter)
            for one in self.optimizers
            if id(one) not in stepped
            for group in one.param_groups
            for parameter in group["params"]
        }
        return {
            f"{number}.{name}": parameter.grad.detach()
            for number, net in enumerate(self.nets)
            for name, parameter in net.named_parameters()
            if id(parameter) in held and parameter.grad is not None
        }

    def wait(self, gradients: Mapping[str, Tensor]) -> None:
        """Puts back what `waiting` returned."""
        for number, net in enumerate(self.nets):
            for name, parameter in net.named_parameters():
                if (saved := gradients.get(f"{number}.{name}")) is not None:
                    parameter.grad = saved.to(parameter.device, copy=True)

    def load(self, weights: Mapping[str, Any], state: State) -> None:
        """Puts a saved state back."""
        for net, saved, buffers in zip(self.nets, [weights, *state["nets"]], state["buffers"], strict=True):
            net.load_state_dict(load_extra(net, saved), strict=False)
            load_buffers(net, buffers)
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, one["state"])
        for other, one in zip(self.others, state["others"], strict=True):
            other.load_state_dict(one["state"])


def _kept(thing: Any) -> State:
    return {"kind": type(thing).__qualname__, "state": thing.state_dict()}


def loader_state(loader: PreparedLoader, *, running: bool) -> State:
    """Returns where a loader is, on this rank.

    Args:
        loader: prepared.
        running: whether a training pass over it runs, which began with the states that are kept then.
    """
    sources, view = loader.view(train=True).sources, loader.view(train=True)
    return {
        "sources": sources.began if running else sources.states(),
        "datasets": sources.states(datasets=True) if running else {},
        "generators": loader.began if running else [one.get_state() for one in view.generators()],
        "evidence": [None if draws is None else draws.evidence.state() for draws in loader.draws],
        "used": loader.draws[0].used if running and loader.draws[0] is not None else None,
        "averages": loader.replica.averages,
    }


def load_loader(loader: PreparedLoader, state: State, epochs: Mapping[bool, int], *, same_ranks: bool) -> None:
    """Puts a loader to where it was.

    Args:
        loader: prepared, and not iterated over yet.
        state: what `loader_state` returned.
        epochs: its passes before.
        same_ranks: whether there are as many ranks as there were.
    """
    view = loader.view(train=True)
    for epoch in range(1, epochs[True] + 1):
        view.sources.replay(epoch)
    for train in (True, False):  # one loader, and a validation pass, too, begins anew where its state is that of an end
        loader.view(train=train).sources.load(state["sources"])
    for generator, saved in zip(view.generators(), state["generators"], strict=True):
        generator.set_state(saved)
    for draws, evidence in zip(loader.draws, state["evidence"], strict=True):
        if draws is not None and evidence is not None:
            draws.evidence.load(evidence)
    if same_ranks:
        loader.replica.resume(state["averages"])
    loader.epochs.update(epochs)
