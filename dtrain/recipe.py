"""The user's file: found, imported, and bound to the config's parameters.

A recipe defines `train_step` and `valid_step`, and either builders, which take their parameters from the
config, or the objects themselves, as in a notebook. The signature of a builder is its schema.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, Sampler

from dtrain import share
from dtrain.attributes import attributes_of
from dtrain.batches import BatchFunctions
from dtrain.config import BUILDER_SECTIONS, Settings
from dtrain.errors import ConfigError, RecipeError, add_remark, nearest
from dtrain.import_steps import ImportStep, import_steps
from dtrain.learning import Interval, Task
from dtrain.parameters import freeze, regroup
from dtrain.recipe_file import locate, module_name, syntax_problem
from dtrain.recomputing import KEY as RECOMPUTED
from dtrain.recomputing import recompute
from dtrain.signatures import MONITOR, Builder, check_parameters, own_keys
from dtrain.sources import parts_of
from dtrain.synced import check_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """An imported recipe.

    Attributes:
        module: the user's module.
        path: its file.
        builders: section of the config -> the function that takes its parameters.
        steps: of optimizers, while it was imported.
    """

    module: ModuleType
    path: Path
    builders: dict[str, Builder]
    steps: list[ImportStep] = field(default_factory=list)

    def parameters(self) -> dict[str, list[str]]:
        """Returns section -> names of the parameters that its builder takes from the config."""
        return {section: list(builder.parameters) for section, builder in self.builders.items()}


def load_recipe(reference: str, base: Path) -> Recipe:
    """Imports a recipe.

    Raises:
        RecipeError: the file or module is missing, or has a syntax error.
        Exception: whatever the user's file raises when it is imported.
    """
    path = locate(reference, base)
    with import_steps() as steps:
        module = _import_module(reference) if path is None else _import_file(path.resolve())
    file = Path(module.__file__ or reference)
    functions = {
        section: function
        for section, name in BUILDER_SECTIONS.items()
        if callable(function := getattr(module, name, None))
    }
    builders = {
        section: Builder.of(function, skip=1 if section in ("optimizer", "scheduler") else 0)
        for section, function in functions.items()
    }
    return Recipe(module, file, builders, steps)


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")) or name == "__main__":
        raise RecipeError(f"recipe {name!r} is neither a .py file nor a module's name.")
    _put_on_path(Path.cwd())
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # a package above it is there, but needs something that is not
        found = None
    if found is None:
        file = f"{name}.py"
        hint = f" There is a file {file}: write recipe={file}." if Path(file).is_file() else ""
        near = nearest(name, [config.stem for config in share.folder("configs").glob("*.yaml")])
        raise RecipeError(f"recipe {name}: there is no module of this name, and no bundled config.{near}{hint}")
    return _run_import(lambda: importlib.import_module(name), name)


def _import_file(path: Path) -> ModuleType:
    """Imports a file as `python FILE` would find things: its own folder first on the path."""
    _put_on_path(path.parent)
    name = module_name(path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"recipe {path}: cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # DataLoader workers find a dataset's class by this name
    loader = spec.loader
    try:
        _run_import(lambda: loader.exec_module(module), str(path))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _run_import(run: Callable[[], T], name: str) -> T:
    """Imports; a syntax error or a sys.exit() in the user's file becomes one message."""
    try:
        return run()
    except SyntaxError as error:
        raise syntax_problem(error) from None
    except SystemExit as error:
        raise RecipeError(
            f"recipe {name} called sys.exit({error.code!r}) while it was imported. "
            "Put what is to run as a script under `if __name__ == '__main__':`."
        ) from None


def bind(recipe: Recipe, settings: Settings) -> Task:
    """Builds a recipe's objects with the config's parameters.

    Raises:
        ConfigError: a parameter is unknown or of the wrong type.
        RecipeError: the recipe lacks something, or a builder returns the wrong thing.
    """
    settings.place(recipe.parameters())
    check_parameters(recipe.builders, recipe.path, settings)
    train_step = _function(recipe, "train_step")
    module = _model(recipe, settings)
    for step in recipe.steps:
        step.check(module)
    freeze(module, settings.config.parameters.freeze, settings.place_of("parameters.freeze"))
    recompute(module, settings.config.train.activation_checkpointing, settings.place_of(RECOMPUTED))
    dl_train, dl_valid = _loaders(recipe, settings)
    valid_step = _function(recipe, "valid_step") if dl_valid is not None else None
    optimizer = _built(recipe, settings, "optimizer", module)
    if optimizer is None:
        optimizer = getattr(module, "optimizer", None) or getattr(recipe.module, "optimizer", None)
    known = optimizer if hasattr(optimizer, "param_groups") else None
    regroup(known, module, settings.config.parameters, settings.places)
    scheduler, interval = _scheduler(recipe, settings, optimizer)
    if scheduler is not None and not hasattr(scheduler, "step"):
        raise RecipeError(f"{recipe.path}: build_scheduler returned {scheduler!r}, which has no step().")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        if not isinstance(optimizer, (list, tuple, dict)):
            raise RecipeError(f"{recipe.path}: the optimizer is {optimizer!r}, not a torch.optim.Optimizer.")
        setattr(module, "optimizer", optimizer)  # noqa: B010 - several, for the step to choose from; the step itself steps them
        optimizer = None
    more: dict[str, Any] = {"metrics": _metrics(recipe), "batches": _batches(recipe)}
    task = Task(module, train_step, dl_train, valid_step, dl_valid, optimizer, scheduler, interval, **more)
    task.others = _others(recipe, task)
    task.monitor = _plateau_monitor(recipe, settings, scheduler)
    return task


def _plateau_monitor(recipe: Recipe, settings: Settings, scheduler: Any) -> str | None:
    """Returns the column that ReduceLROnPlateau watches, where the config names one; None for another scheduler.

    Raises:
        ConfigError: `scheduler.monitor` is no name, or there is nothing that would watch it.
    """
    given = settings.config.scheduler.get(MONITOR) if MONITOR in own_keys(recipe.builders, "scheduler") else None
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    if given is not None and not (plateau and isinstance(given, str)):
        raise ConfigError(
            f"scheduler.{MONITOR} = {given!r} ({settings.place_of(f'scheduler.{MONITOR}')}): it names the column that "
            f"ReduceLROnPlateau watches, and build_scheduler returned {type(scheduler).__name__}. "
            "Leave it out, or return a ReduceLROnPlateau."
        )
    return (given or settings.config.checkpoint.monitor) if plateau else None


def _others(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What else has a state, by its name: objects of the recipe's file, and attributes of the net and its modules.

    What belongs to the loaders is kept with them, see `dtrain.sources`.
    """
    named = dict(vars(recipe.module)) | attributes_of(task.module)
    own = (*task.module.modules(), task.optimizer, task.scheduler, *task.metrics.values())
    loaders = (part for loader in (task.dl_train, task.dl_valid) for part in parts_of(loader).values())
    known = {id(thing) for thing in (*own, *loaders)}
    found = {}
    for name, thing in named.items():
        if id(thing) not in known and _has_state(thing):
            known.add(id(thing))
            found[name] = thing
    return found


def _batches(recipe: Recipe) -> BatchFunctions:
    """What the recipe says of its batches; `batch_size` may also be a number, for the recipe's own use."""
    named = {name: getattr(recipe.module, name, None) for name in ("batch_size", "split_batch")}
    return BatchFunctions(**{name: function for name, function in named.items() if callable(function)})


def _has_state(thing: Any) -> bool:
    methods = (getattr(thing, name, None) for name in ("state_dict", "load_state_dict"))
    elsewhere = (type, ModuleType, Optimizer, DataLoader, Sampler, IterableDataset)
    return not isinstance(thing, elsewhere) and all(callable(method) for method in methods)


def _metrics(recipe: Recipe) -> dict[str, Any]:
    build = getattr(recipe.module, "build_metrics", None)
    if build is None:
        return {}
    if not callable(build):
        raise RecipeError(f"{recipe.path}: build_metrics is a {type(build).__name__}, not a function.")
    needed = [p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty and p.kind < 2]
    if needed:
        raise RecipeError(f"{recipe.path}: build_metrics takes no parameters, but asks for {', '.join(needed)}.")
    return check_metrics(build(), f"{recipe.path}: build_metrics()")


def _built(recipe: Recipe, settings: Settings, section: str, *first: Any) -> Any:
    """Calls a section's builder with the config's parameters; None where the recipe has no such builder."""
    builder = recipe.builders.get(section)
    if builder is None:
        return None
    own = own_keys(recipe.builders, section)
    parameters = {key: value for key, value in getattr(settings.config, section).items() if key not in own}
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
        if given:
            add_remark(error, _given_to(builder, section, given, settings))
        raise


def _given_to(builder: Builder, section: str, given: dict[str, Any], settings: Settings) -> str:
    """The values of a config that a builder was called with, in words, since it may be one of them that it rejects."""
    shown = {key: textwrap.shorten(repr(value), 80) for key, value in given.items()}
    call = ", ".join(f"{key}={value}" for key, value in shown.items())
    places = (f"{section}.{key} = {value} ({settings.place_of(f'{section}.{key}')})" for key, value in shown.items())
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
            raise RecipeError(f"{recipe.path} defines no net: neither build_model(...) nor an object `model` or `net`.")
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{recipe.path}: the model is a {type(model).__name__}, not a torch.nn.Module.")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise RecipeError(
            f"{recipe.path}: {lazy[0]} has no shape yet (a lazy module). Run one batch through the net in build_model."
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
            "it should return (dl_train, dl_valid), the second one None without validation."
        )
    return built[0], built[1]


def _scheduler(recipe: Recipe, settings: Settings, optimizer: Any) -> tuple[Any, Interval]:
    """A scheduler counts epochs; with `(scheduler, "step")` it counts optimizer steps."""
    if "scheduler" in recipe.builders and optimizer is None:
        raise RecipeError(f"{recipe.path} has build_scheduler but no optimizer. Define build_optimizer(model).")
    built = _built(recipe, settings, "scheduler", optimizer)
    if isinstance(built, tuple):
        if len(built) != 2 or built[1] not in ("epoch", "step"):
            raise RecipeError(
                f"{recipe.builders['scheduler'].where}: build_scheduler returned {built!r}; "
                'it should return a scheduler, or (scheduler, "step") or (scheduler, "epoch").'
            )
        return built[0], built[1]
    return built, "epoch"
