"""What the objects of a call were made with, in a config's own kinds: compared when its run is resumed.

A recipe's config has its builders' parameters. A call gets the objects themselves: what can be read of them stands in
for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.data.loader_group import train_by_name

Facts = dict[str, Any]

_PLAIN = (bool, int, float, str, type(None))
_NOT_NUMBERS = ("params", "foreach", "fused", "capturable", "differentiable", "initial_lr", "max_lr", "min_lr")
# What a scheduler counts, or takes from its optimizer.
_COUNTS = ("last_epoch", "_last_lr", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "mode_worse", "T_cur")
_LONGEST = 100

# Training changes what an optimizer or a net's attribute says; the same call in the same process means its beginning.
_AT_FIRST: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def described(
    run: Path, *, model: nn.Module, optimizer: Any, scheduler: Any, loaders: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """Returns what the objects of a call were made with.

    Args:
        run: the run's folder; objects are described as they were when they were first given to it, in this process.
        model, optimizer, scheduler: of the call; the latter two may be None.
        loaders: argument -> loader.

    Returns:
        dotted key of the config -> value, and the argument that it is of.
    """
    found = {"model.class": (type(model).__qualname__, "model")}
    for section, thing, facts in (
        ("optimizer", optimizer, optimizer_facts),
        ("scheduler", scheduler, scheduler_facts),
    ):
        if thing is not None:
            found |= {f"{section}.{key}": (value, section) for key, value in at_first(run, thing, facts).items()}
    for argument, loader in loaders.items():
        if loader is not None:
            split = argument.removeprefix("dl_").removesuffix("_data").removesuffix("id") or argument
            for name, one in train_by_name(loader).items():
                place = f"data.{split}.{name}" if name else f"data.{split}"
                found |= {f"{place}.{key}": (value, argument) for key, value in loader_facts(one).items()}
    return found


def at_first(run: Path, thing: Any, facts: Any) -> Any:
    """Returns the facts of an object as they were when it was first given to a run, in this process."""
    known = _AT_FIRST.setdefault(thing, {})
    return known.setdefault(str(run.absolute()), facts(thing))


def optimizer_facts(optimizer: Any) -> Facts:
    """Returns an optimizer's class and hyperparameters; of further groups, where theirs differ."""
    facts: Facts = {"class": type(optimizer).__qualname__}
    if not isinstance(optimizer, Optimizer):
        return facts
    first: Facts = {}
    for number, group in enumerate(optimizer.param_groups):
        now = {**group, "lr": group["initial_lr"]} if "initial_lr" in group else group
        values = {key: _plain(value) for key, value in now.items() if key not in _NOT_NUMBERS and _is_plain(value)}
        first = first or values
        prefix = f"group_{number}." if number else ""
        facts |= {f"{prefix}{key}": value for key, value in values.items() if not number or first.get(key) != value}
    return facts


def scheduler_facts(scheduler: Any) -> Facts:
    """Returns a scheduler's class and settings, but for what it counts."""
    facts: Facts = {"class": type(scheduler).__qualname__}
    state = scheduler.state_dict() if callable(getattr(scheduler, "state_dict", None)) else {}
    return facts | _settings_in(state)


def _settings_in(state: Mapping[str, Any], prefix: str = "") -> Facts:
    found: Facts = {}
    for key, value in state.items():
        if key in _COUNTS or (str(key).startswith("_") and key != "_schedulers"):
            continue
        if isinstance(value, (list, tuple)) and any(isinstance(part, Mapping) for part in value):
            for number, part in enumerate(value):
                found |= _settings_in(part, f"{prefix}{number}.") if isinstance(part, Mapping) else {}
        elif _is_plain(value):
            found[f"{prefix}{key}"] = _plain(value)
    return found


def loader_facts(loader: Any) -> Facts:
    """Returns how a loader makes batches, as far as it says."""
    facts: Facts = {"class": type(loader).__qualname__}
    for key in ("batch_size", "drop_last"):
        value = getattr(loader, key, None)
        if isinstance(value, (int, type(None))) and hasattr(loader, key):
            facts[key] = value
    for key in ("sampler", "dataset"):
        if hasattr(loader, key):
            facts[key] = type(getattr(loader, key)).__qualname__
    return facts


def net_text(module: nn.Module) -> str:
    """Returns a net's modules with their plain attributes, such as a dropout's p: a line of Python each."""
    lines = []
    for path, part in module.named_modules():
        values = {key: value for key, value in vars(part).items() if not key.startswith("_") and _is_plain(value)}
        values.pop("training", None)
        given = ", ".join(f"{key}={_plain(value)!r}" for key, value in values.items() if key.isidentifier())
        lines.append(f'net["{path}"] = {type(part).__name__}({given})\n')
    return "".join(lines)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= _LONGEST and all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, Tensor) else value
