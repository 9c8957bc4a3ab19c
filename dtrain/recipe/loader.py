"""The user's file: found, imported, and bound to the config's parameters.

A recipe defines `train_step` and `valid_step`, and either builders, which take their parameters from the
config, or the objects themselves, as in a notebook. The signature of a builder is its schema.
"""

from __future__ import annotations

import copy
import inspect
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtrain.config import BUILDER_SECTIONS, Settings
from dtrain.config.calls import refuse_call
from dtrain.config.recipe_file import locate
from dtrain.data.batches import BatchFunctions
from dtrain.engine.hooks import check_callbacks, hooks_of, states_of
from dtrain.engine.synced_metrics import check_metrics
from dtrain.engine.train_step import Interval, Task
from dtrain.errors import ConfigError, RecipeError, add_remark
from dtrain.model.activation_checkpointing import KEY as RECOMPUTED
from dtrain.model.activation_checkpointing import recompute
from dtrain.provenance.code import Code, project_root
from dtrain.provenance.loading import loadings, record_loading
from dtrain.provenance.opened import opened_files
from dtrain.recipe.import_steps import ImportStep, import_steps
from dtrain.recipe.importing import import_file, import_module
from dtrain.recipe.monitors import name_monitors
from dtrain.recipe.others import combined, others_with_state
from dtrain.recipe.param_groups import freeze, regroup
from dtrain.recipe.signature import MONITOR, Builder, check_parameters, mark_secrets, own_keys, with_values
from dtrain.recipe.supplied import RANK, supplied_names, supplied_values

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """An imported recipe.

    Attributes:
        module: the user's module.
        path: its file.
        builders: section of the config -> the function that takes its parameters.
        code: the sources that were loaded.
        steps: of optimizers, while it was imported.
    """

    module: ModuleType
    path: Path
    builders: dict[str, Builder]
    code: Code
    steps: list[ImportStep] = field(default_factory=list)

    def parameters(self) -> dict[str, list[str]]:
        """Returns section -> names of the parameters that its builder takes from the config.

        Those that it gets without it (`epochs`) can be set by their whole name alone: `scheduler.epochs`.
        """
        return {
            section: [
                name for name in builder.parameters if name not in supplied_names(section, builder.parameters, ())
            ]
            for section, builder in self.builders.items()
        }


def load_recipe(reference: str, base: Path) -> Recipe:
    """Imports a recipe.

    Raises:
        RecipeError: the file or module is missing, or has a syntax error.
        Exception: whatever the user's file raises when it is imported.
    """
    refuse_call(reference)
    path = locate(reference, base)
    project = project_root(Path.cwd() / "recipe.py" if path is None else path.resolve())
    record_loading(project=project)
    opened_files.watch(project)
    since = loadings()
    with import_steps() as steps:
        module = import_module(reference) if path is None else import_file(path.resolve())
    file = Path(module.__file__ or reference)
    code = Code.of(module, file.name if path is not None else f"{reference.replace('.', '/')}.py", since)
    functions = {
        section: function
        for section, name in BUILDER_SECTIONS.items()
        if callable(function := getattr(module, name, None))
    }
    train_step = functions.pop("step", None)
    builders = {
        section: Builder.of(function, skip=1 if section in ("optimizer", "scheduler") else 0)
        for section, function in functions.items()
    }
    if train_step is not None:
        builders["step"] = Builder.of_steps(train_step, getattr(module, "valid_step", None))
    return Recipe(module, file, builders, code, steps)


def bind(recipe: Recipe, settings: Settings, begin: Callable[[nn.Module], None] | None = None) -> Task:
    """Builds a recipe's objects with the config's parameters.

    Args:
        recipe: what `load_recipe` returned.
        settings: the config.
        begin: puts other weights into the net, before anything is made of it.

    Raises:
        ConfigError: a parameter is unknown or of the wrong type.
        RecipeError: the recipe lacks something, or a builder returns the wrong thing.
    """
    _check(recipe, settings)
    train_step = with_values(_function(recipe, "train_step"), settings.config.step)
    module = _model(recipe, settings)
    for step in recipe.steps:
        step.check(module)
    if begin is not None:
        begin(module)
    _freeze(module, settings)
    recompute(module, settings.config.train.activation_checkpointing, settings.place_of(RECOMPUTED))
    dl_train, dl_valid = _loaders(recipe, settings)
    dl_train = combined(dl_train, recipe.builders["data"].where if "data" in recipe.builders else recipe.path, settings)
    name_monitors(settings, dl_valid)
    valid_step = None
    if dl_valid is not None:
        valid_step = with_values(_function(recipe, "valid_step"), settings.config.step)
    optimizer = _built(recipe, settings, "optimizer", module, dl_train=dl_train)
    if optimizer is None:
        optimizer = getattr(module, "optimizer", None) or getattr(recipe.module, "optimizer", None)
    known = optimizer if hasattr(optimizer, "param_groups") else None
    regroup(known, module, settings.config.parameters, settings.places)
    scheduler, interval = _scheduler(recipe, settings, optimizer, dl_train)
    if scheduler is not None and not hasattr(scheduler, "step"):
        raise RecipeError(f"{recipe.path}: build_scheduler returned {scheduler!r}, which has no step().")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        if not isinstance(optimizer, (list, tuple, dict)):
            raise RecipeError(f"{recipe.path}: the optimizer is {optimizer!r}, not a torch.optim.Optimizer.")
        setattr(module, "optimizer", optimizer)  # noqa: B010 - several, for the step to choose from; the step itself steps them
        optimizer = None
    more: dict[str, Any] = {"metrics": _metrics(recipe), "batches": _batches(recipe, settings), "code": recipe.code}
    task = Task(module, train_step, dl_train, valid_step, dl_valid, optimizer, scheduler, interval, **more)
    objects = check_callbacks(_built_bare(recipe, "build_callbacks"), f"{recipe.path}: build_callbacks()")
    task.hooks = hooks_of(vars(recipe.module), objects, str(recipe.path))
    task.others = others_with_state(vars(recipe.module), task)
    named = {id(other) for other in task.others.values()}
    task.others |= {name: one for name, one in states_of(objects).items() if id(one) not in named}
    task.valid_together = _switch(recipe, "valid_together")
    task.monitor = _plateau_monitor(recipe, settings, scheduler)
    return task


def build_net(recipe: Recipe, settings: Settings, begin: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Builds a recipe's net alone, of each call's own; what it builds first is what `bind` does.

    Args:
        recipe, settings, begin: as for `bind`.

    Raises:
        ConfigError, RecipeError: as `bind`.
    """
    _check(recipe, settings)
    net = _model(recipe, settings)
    # A module is imported once in a process, and the object in its file would be everybody's.
    net = net if "model" in recipe.builders else copy.deepcopy(net)
    if begin is not None:
        begin(net)
    _freeze(net, settings)
    return net


def _check(recipe: Recipe, settings: Settings) -> None:
    settings.place(recipe.parameters())
    mark_secrets(recipe.module, recipe.path, recipe.builders)
    check_parameters(recipe.builders, recipe.path, settings)


def _freeze(module: nn.Module, settings: Settings) -> None:
    freeze(module, settings.config.parameters.freeze, settings.place_of("parameters.freeze"))


def _plateau_monitor(recipe: Recipe, settings: Settings, scheduler: Any) -> str | None:
    """Returns the column that ReduceLROnPlateau watches, where the config names one; None for another scheduler.

    Raises:
        ConfigError: `scheduler.monitor` is no name, or there is nothing that would watch it.
    """
    given = settings.config.scheduler.get(MONITOR) if MONITOR in own_keys(recipe.builders, "scheduler") else None
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    if given is not None and not (plateau and isinstance(given, str)):
        raise ConfigError(
            f"scheduler.{MONITOR} = {given!r} ({settings.place_of(f'scheduler.{MONITOR}')}): it is the column that "
            "ReduceLROnPlateau watches, but build_scheduler returned "
            f"{type(scheduler).__name__}. Remove it, or return a ReduceLROnPlateau."
        )
    return (given or settings.config.checkpoint.monitor) if plateau else None


def _batches(recipe: Recipe, settings: Settings) -> BatchFunctions:
    """What the recipe says of its batches; `batch_size` may also be a number, for the recipe's own use."""
    named = {name: getattr(recipe.module, name, None) for name in ("batch_size", "split_batch")}
    builder = recipe.builders.get("data")
    supplied = () if builder is None else supplied_names("data", builder.parameters, settings.config.data)
    return BatchFunctions(**{n: one for n, one in named.items() if callable(one)}, by_rank=RANK in supplied)


def _switch(recipe: Recipe, name: str) -> bool:
    value = getattr(recipe.module, name, False)
    if not isinstance(value, bool):
        raise RecipeError(f"{recipe.path}: {name} = {value!r}: should be True or False.")
    return value


def _metrics(recipe: Recipe) -> dict[str, Any]:
    built = _built_bare(recipe, "build_metrics")
    return {} if built is None else check_metrics(built, f"{recipe.path}: build_metrics()")


def _built_bare(recipe: Recipe, name: str) -> Any:
    """Calls a builder that takes nothing; None where the recipe has none."""
    build = getattr(recipe.module, name, None)
    if build is None:
        return None
    if not callable(build):
        raise RecipeError(f"{recipe.path}: {name} is a {type(build).__name__}, not a function.")
    needed = [p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty and p.kind < 2]
    if needed:
        raise RecipeError(f"{recipe.path}: {name} must not have required parameters, but has {', '.join(needed)}.")
    return build()


def _built(recipe: Recipe, settings: Settings, section: str, *first: Any, dl_train: Any = None) -> Any:
    """Calls a section's builder with the config's parameters; None where the recipe has no such builder."""
    builder = recipe.builders.get(section)
    if builder is None:
        return None
    own = own_keys(recipe.builders, section)
    parameters = {key: value for key, value in getattr(settings.config, section).items() if key not in own}
    names = supplied_names(section, builder.parameters, parameters)
    by_rank = _batches(recipe, settings).by_rank
    parameters |= supplied_values(names, builder.parameters, dl_train, settings, builder.where, by_rank=by_rank)
    try:
        inspect.signature(builder.function).bind(*first, **parameters)
    except ValueError:
        pass  # a builtin without a signature
    except TypeError as error:
        first_is = {"optimizer": "the model first, then ", "scheduler": "the optimizer first, then "}.get(section, "")
        raise RecipeError(
            f"{builder.where}: {builder.name}{inspect.signature(builder.function)} cannot be called: {error}. dtrain "
            f"passes {first_is}the config's {section}.* by name."
        ) from None
    try:
        return builder.function(*first, **parameters)
    except Exception as error:
        given = {key: value for key, value in parameters.items() if settings.place_of(f"{section}.{key}") != "default"}
        if isinstance(error, FileNotFoundError):
            missing = _missing(error, {**builder.defaults(), **parameters})
            given = missing or given
            if missing:
                add_remark(error, f"if it is elsewhere, set {section}.{next(iter(missing))}=PATH")
        if given:
            add_remark(error, _given_to(builder, section, given, settings))
        raise


def _missing(error: FileNotFoundError, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters, defaults too, that a missing file is named after; notes where a relative path begins."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return {}
    file = Path(error.filename)
    if not file.is_absolute():
        add_remark(error, f"the path is relative: it starts from the folder where dtrain was started, {Path.cwd()}")
    whole = Path.cwd() / file
    given = {key: value for key, value in values.items() if isinstance(value, (str, os.PathLike)) and str(value)}
    # The file itself, or a folder that it is in: a word that merely occurs in its name is no path.
    leading = {whole, *whole.parents} - {Path.cwd()}
    return {key: value for key, value in given.items() if Path.cwd() / Path(value).expanduser() in leading}


def _given_to(builder: Builder, section: str, given: dict[str, Any], settings: Settings) -> str:
    """The values of a config that a builder was called with, in words, since it may be one of them that it rejects."""
    shown = {key: textwrap.shorten(repr(value), 80) for key, value in given.items()}
    call = ", ".join(f"{key}={value}" for key, value in shown.items())
    places = (f"{section}.{key} = {value} ({settings.origin(f'{section}.{key}')})" for key, value in shown.items())
    return f"in {builder.name}({call}): {', '.join(places)}"


def _function(recipe: Recipe, name: str) -> Callable[..., Any]:
    found = getattr(recipe.module, name, None)
    if not callable(found):
        there = [n for n in ("train_step", "valid_step") if callable(getattr(recipe.module, n, None))]
        hint = " Without validation, set dl_valid = None, or let build_dataloaders return (dl_train, None)."
        raise RecipeError(
            f"{recipe.path} defines no {name}(model, features, labels)"
            f"{f'; it defines {there[0]}' if there else ''}.{hint if name == 'valid_step' else ''}"
        )
    return found  # type: ignore[no-any-return]


def _model(recipe: Recipe, settings: Settings) -> nn.Module:
    model = _built(recipe, settings, "model")
    if model is None and "model" not in recipe.builders:
        model = getattr(recipe.module, "model", None) or getattr(recipe.module, "net", None)
        if model is None:
            raise RecipeError(
                f"{recipe.path} defines no model: neither build_model(...) nor an object `model` or `net`."
            )
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = " build_model returns nothing: end it with `return model`." if model is None else ""
        hint = " Return an instance, with parentheses." if isinstance(model, type) else hint
        raise RecipeError(f"{recipe.path}: the model is {what}, not a torch.nn.Module.{hint}")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise RecipeError(
            f"{recipe.path}: {lazy[0]} has no shape yet (a lazy module). Run one "
            "batch through the model in build_model."
        )
    return model


def _loaders(recipe: Recipe, settings: Settings) -> tuple[Any, Any]:
    if "data" not in recipe.builders:
        if not hasattr(recipe.module, "dl_train"):
            raise RecipeError(f"{recipe.path} defines no data: neither build_dataloaders(...) nor `dl_train`.")
        return recipe.module.dl_train, getattr(recipe.module, "dl_valid", getattr(recipe.module, "dl_val", None))
    built = _built(recipe, settings, "data")
    if not isinstance(built, (tuple, list)) or len(built) != 2:
        raise RecipeError(
            f"{recipe.builders['data'].where}: build_dataloaders returned {type(built).__name__}; "
            "it should return (dl_train, dl_valid), with dl_valid=None if there is no validation."
        )
    return built[0], built[1]


def _scheduler(recipe: Recipe, settings: Settings, optimizer: Any, dl_train: Any) -> tuple[Any, Interval]:
    """A scheduler counts epochs; with `(scheduler, "step")` it counts optimizer steps."""
    if "scheduler" in recipe.builders and optimizer is None:
        raise RecipeError(f"{recipe.path} has build_scheduler but no optimizer. Define build_optimizer(model).")
    built = _built(recipe, settings, "scheduler", optimizer, dl_train=dl_train)
    if isinstance(built, tuple):
        if len(built) != 2 or built[1] not in ("epoch", "step"):
            raise RecipeError(
                f"{recipe.builders['scheduler'].where}: build_scheduler returned {built!r}; "
                'it should return a scheduler, or (scheduler, "step") or (scheduler, "epoch").'
            )
        return built[0], built[1]
    return built, "epoch"
