"""Weights from elsewhere put into a net, by name: what does not match is named, and left out only where asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoint.extra import extra_keys, load_extra
from dtrain.checkpoint.left_out import changed
from dtrain.checkpoint.outside import OutsideWeights
from dtrain.errors import UsageError, nearest
from dtrain.layout import CONFIG

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's prefix, and torch.compile's
_MOST_NAMED = 20


@dataclass(frozen=True)
class Wanted:
    """How weights are to be put into a net, and how a message calls the ways to say so.

    Attributes:
        partial: whether what does not match may be left out.
        rename: prefix of the source's names -> what stands in its place in the net's.
        ask_partial: the words that ask for the first.
        ask_rename: those for the second.
    """

    partial: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)
    ask_partial: str = "partial=True"
    ask_rename: str = "rename={'OLD.': 'NEW.'}"


@dataclass(frozen=True)
class Fit:
    """Which of a source's weights a net takes.

    Attributes:
        values: by the net's names.
        left: in words, what does not match.
        stripped: the wrapper's prefix that was taken off all names; "" for none.
        total: how many the net has.
    """

    values: dict[str, Any]
    left: list[str]
    stripped: str
    total: int


def put_into(module: nn.Module, source: OutsideWeights, how: Wanted) -> Fit:
    """Puts a source's weights into a net, which is changed in place; or left as it is, where they do not match.

    Args:
        module: the net itself, on any device; its dtypes stay.
        source: what `read_outside` returned.
        how: what may be left out, and what is called otherwise.

    Raises:
        UsageError: the names or shapes differ, and `partial` was not asked for; or nothing matches at all. What does
            not match is named.
    """
    fit = fit_of(module, source, how)
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if parameters and fit.values.keys().isdisjoint(parameters):
        raise UsageError(
            f"{source.where} has no parameter of the model: it has {_names(source.values)}; the model has "
            f"{_names(parameters)}. If they are the same under other names: {how.ask_rename}."
        )
    if fit.left and not how.partial:
        raise UsageError(
            f"{source.where} does not match the model: {_few(fit.left)}. {_built_there(source)}To begin with the "
            f"{len(fit.values)} of {fit.total} tensors that match, and the rest as the model is built: "
            f"{how.ask_partial}. For other names: {how.ask_rename}."
        )
    module.load_state_dict(load_extra(module, fit.values), strict=False)
    return fit


def _built_there(source: OutsideWeights) -> str:
    """Says where the parameters of the source's own model stand, if it is a run's."""
    config = next((one / CONFIG for one in Path(source.where).parents[2:3] if (one / CONFIG).is_file()), None)
    return "" if config is None else f"To build the model as there, see model: in {config}. "


def log_of(fit: Fit, where: str) -> str:
    """Returns in words what was taken, and by name what was not."""
    prefix = f", without the prefix {fit.stripped!r}" if fit.stripped else ""
    if not fit.left:
        return f"weights from {where}{prefix}"
    return f"weights from {where}{prefix}: {len(fit.values)} of {fit.total} tensors; not taken: {_few(fit.left)}"


def fit_of(module: nn.Module, source: OutsideWeights, how: Wanted) -> Fit:
    """Compares a source with a net.

    Raises:
        UsageError: a prefix that is to be renamed is no name's, two names become one, or two that are one parameter
            of the net have different values.
    """
    own = module.state_dict(keep_vars=True)
    named, stripped = _renamed(source, how, own)
    extra = extra_keys(module)
    shapes = {
        name: f"{name} {_form(named[name])} there and {_form(own[name])} here"
        for name in own
        if name in named and name not in extra and _form(named[name]) != _form(own[name])
    }
    values = {name: value for name, value in named.items() if name in own and name not in shapes}
    _check_tied(own, values, source.where)
    held = {id(own[name]) for name in values if isinstance(own[name], Tensor)}
    other = set(changed(module, {name: one for name, one in source.left_out.items() if name in own}))
    same = source.left_out.keys() - other  # the checkpoint lacks them, and the net has them as they were
    missing = [name for name in own if name not in named and id(own[name]) not in held and name not in same]
    further = [name for name in named if name not in own]
    left = [*shapes.values()]
    left += [f"not there: {_names(missing)}"] * bool(missing) + [f"not in the model: {_names(further)}"] * bool(further)
    return Fit(values, left, stripped, len(own))


def _renamed(source: OutsideWeights, how: Wanted, own: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns the source's values by the net's names, and the wrapper's prefix that was taken off."""
    if not how.rename:
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in source.values) and not any(n.startswith(prefix) for n in own):
                return {name.removeprefix(prefix): value for name, value in source.values.items()}, prefix
        return dict(source.values), ""
    found: dict[str, Any] = {}
    used = set()
    for name, value in source.values.items():
        old = max((one for one in how.rename if name.startswith(one)), key=len, default=None)
        now = name if old is None else how.rename[old] + name[len(old) :]
        used.add(old)
        if now in found:
            raise UsageError(f"{source.where}: {name} and another name both become {now}. Change {how.ask_rename}.")
        found[now] = value
    for old in how.rename.keys() - used:
        near = nearest(old, list(source.values))
        raise UsageError(
            f"{source.where}: no name begins with {old!r}, which is to be renamed.{near} It has "
            f"{_names(source.values)}."
        )
    return found, ""


def _check_tied(own: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Looks whether the names of one parameter of the net have the same values in the source."""
    first: dict[int, str] = {}
    for name in values:
        other = first.setdefault(id(own[name]), name)
        if other != name and isinstance(own[name], Tensor) and not torch.equal(values[name], values[other]):
            raise UsageError(
                f"{where}: {other} and {name} are one parameter in the model, and two with different values there. "
                "Build the model without tying them, or remove one of them from the file."
            )


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "is an extra state"
    kind = "complex" if value.is_complex() else "real" if value.is_floating_point() else "whole"
    return f"has shape {tuple(value.shape)}" + {"real": "", "complex": ", complex", "whole": ", whole numbers"}[kind]


def _names(names: Iterable[str]) -> str:
    return _few(list(names), ", ")


def _few(items: Sequence[str], between: str = "; ") -> str:
    more = len(items) - _MOST_NAMED
    return between.join(items[:_MOST_NAMED]) + (f"{between}and {more} more" if more > 0 else "")
