"""Which parameters learn, and how: frozen ones, and groups of the optimizer, by patterns of their names.

A pattern is matched against a parameter's whole name, as in `named_parameters()`: `layers.0.*`, `*.bias`. `norms`
stands for the parameters of normalisation layers, `biases` for those named bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.config.schema import ParametersConfig
from dtrain.errors import ConfigError, nearest

NORMS, BIASES = "norms", "biases"
Rule = tuple[set[str], dict[str, Any]]  # names, and the options that they have
_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def freeze(module: nn.Module, patterns: Iterable[str], place: str) -> None:
    """Has the parameters that some pattern matches keep their values.

    Args:
        module: the net.
        patterns: see above.
        place: where they were given, for messages.

    Raises:
        ConfigError: a pattern matches none, or all learn no more.
    """
    patterns = list(patterns)
    for name in _matched(module, patterns, "parameters.freeze", place):
        module.get_parameter(name).requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"parameters.freeze = {patterns} ({place}): no parameter of the model would be trained.")


def regroup(
    optimizer: Optimizer | None, module: nn.Module, config: ParametersConfig, places: Mapping[str, str]
) -> None:
    """Splits an optimizer's groups, so that the parameters that a pattern matches have options of their own.

    Args:
        optimizer: it has not stepped yet; None where dtrain does not know it.
        module: the net.
        config: the config's section.
        places: dotted key -> where it was given, for messages.

    Raises:
        ConfigError: a pattern matches none, an option is unknown, or there is no optimizer.
    """
    rules = _rules(config, module, places)
    if not rules:
        return
    if optimizer is None:
        raise ConfigError(
            "parameters.groups and parameters.no_decay need an optimizer: define build_optimizer(model), or set "
            "model.optimizer."
        )
    _check_options(optimizer, rules)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[str, dict[str, Any]] = {}
        for parameter in group["params"]:
            own = _options(names.get(id(parameter), ""), rules)
            parts.setdefault(repr(own), {**group, **own, "params": []})["params"].append(parameter)
        groups += parts.values()
    optimizer.param_groups[:] = groups


def _rules(config: ParametersConfig, module: nn.Module, places: Mapping[str, str]) -> list[Rule]:
    """Returns (names, options), the more important ones first."""
    rules = []
    for options in config.groups:
        own = dict(options)
        pattern = own.pop("match", None)
        place = places.get("parameters.groups", "default")
        if not isinstance(pattern, str) or not own:
            raise ConfigError(
                f"parameters.groups = {options} ({place}): a group is {{match: PATTERN, lr: ..., weight_decay: ...}}."
            )
        rules.append((_matched(module, [pattern], "parameters.groups", place), own))
    undecayed = _matched(module, config.no_decay, "parameters.no_decay", places.get("parameters.no_decay", "default"))
    return [*rules, (undecayed, {"weight_decay": 0.0})] if undecayed else rules


def _options(name: str, rules: list[Rule]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for names, options in reversed(rules):
        if name in names:
            found |= options
    return found


def _check_options(optimizer: Optimizer, rules: list[Rule]) -> None:
    known = [name for name in optimizer.defaults if name != "params"]
    for _, options in rules:
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"parameters: {type(optimizer).__name__} has no option {name!r}.{nearest(name, known)} "
                    f"It has {', '.join(known)}."
                )


def _matched(module: nn.Module, patterns: Iterable[str], key: str, place: str) -> set[str]:
    names = [name for name, _ in module.named_parameters()]
    special = {NORMS: _of_norms(module), BIASES: {name for name in names if name.rpartition(".")[2] == "bias"}}
    found: set[str] = set()
    for pattern in patterns:
        matched = special.get(pattern) or {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            hint = nearest(pattern, [*names, *special])
            raise ConfigError(f"{key} = {pattern!r} ({place}): no parameter of the model has this name.{hint}")
        found |= matched
    return found


def _of_norms(module: nn.Module) -> set[str]:
    return {
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        if isinstance(layer, _NORM_LAYERS)
        for name, _ in layer.named_parameters(recurse=False)
    }
