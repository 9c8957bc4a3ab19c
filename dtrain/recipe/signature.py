"""The signature is the schema: a builder's parameters, checked before it is called."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from dtrain.config import BUILDER_SECTIONS, Settings
from dtrain.config.schema import leaves
from dtrain.engine.valid_loaders import LOADER_NAME
from dtrain.errors import ConfigError, RecipeError, nearest
from dtrain.masking import mark
from dtrain.recipe.defaults import is_same, take_up_defaults, write_defaults
from dtrain.recipe.supplied import supplied_names

MONITOR = "monitor"  # of the scheduler's section: dtrain's own key, unless build_scheduler has such a parameter

_SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Builder:
    """A recipe's function that takes its parameters from a section of the config.

    Attributes:
        function: the user's function.
        parameters: name -> parameter; without those that dtrain passes itself (the model, the optimizer).
        takes_any: whether it has **kwargs.
        where: "file:line" of its definition.
        unwritten: parameters whose default is not written into a run's config -> why; see `write_defaults`.
    """

    function: Callable[..., Any]
    parameters: dict[str, inspect.Parameter]
    takes_any: bool
    where: str
    unwritten: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable[..., Any], skip: int) -> Builder:
        """Reads a function's signature.

        Args:
            function: the builder.
            skip: number of first parameters that dtrain passes itself.
        """
        try:
            signature = inspect.signature(function, eval_str=True)
        except Exception:  # noqa: BLE001 - evaluating a user's annotations can raise anything
            signature = inspect.signature(function)
        others = list(signature.parameters.values())[skip:]
        named = {p.name: p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return cls(function, named, any(p.kind is p.VAR_KEYWORD for p in others), _where(function))

    @classmethod
    def of_steps(cls, train_step: Callable[..., Any], valid_step: Any) -> Builder:
        """Reads what may be set of a recipe's steps: their parameters with a default; not `loader_name`, dtrain's own.

        Args:
            train_step: the train step.
            valid_step: the valid step; None, or anything that is no function, where there is none.
        """
        steps = [cls.of(step, skip=0) for step in (valid_step, train_step) if callable(step)]
        named = {
            name: p
            for step in steps
            for name, p in step.parameters.items()
            if p.default is not inspect.Parameter.empty and name != LOADER_NAME
        }
        return cls(train_step, named, False, steps[-1].where, _unwritten_of_steps(named, steps))

    @property
    def name(self) -> str:
        """The function's name; a partial or a callable object has its type's."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def described(self) -> str:
        """Returns "build_model(hidden: int = 64), recipe.py:12" for messages."""
        inner = ", ".join(str(p) for p in self.parameters.values())
        return f"{self.name}({inner}), {self.where}"

    def defaults(self) -> dict[str, Any]:
        """Returns name -> default of the parameters that have one."""
        return {name: p.default for name, p in self.parameters.items() if p.default is not p.empty}


def with_values(step: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns a step that gets those of some values that it has a parameter for; itself where there is none."""
    signature = inspect.signature(step)
    own = {name: value for name, value in values.items() if name in signature.parameters}
    if not own:
        return step

    @functools.wraps(step)
    def bound(*arguments: Any) -> Any:
        return step(*arguments, **own)

    left = [parameter for name, parameter in signature.parameters.items() if name not in own]
    bound.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return bound


def _unwritten_of_steps(named: Mapping[str, inspect.Parameter], steps: Sequence[Builder]) -> dict[str, str]:
    """Returns the parameters that a value in a config would not mean the same for: of two steps, or of a batch."""
    found = {}
    for name, parameter in named.items():
        defaults = [step.parameters[name].default for step in steps if name in step.parameters]
        if not all(is_same(one, parameter.default) for one in defaults):
            found[name] = "train_step and valid_step differ in it"
        elif parameter.default is None and parameter.kind is not parameter.KEYWORD_ONLY:
            found[name] = ""  # most often a part of the batch that may be missing
    return found


def _where(function: Callable[..., Any]) -> str:
    try:
        file = inspect.getsourcefile(inspect.unwrap(function)) or "?"
        return f"{file}:{inspect.getsourcelines(inspect.unwrap(function))[1]}"
    except (OSError, TypeError):
        return "?"


def check_parameters(builders: dict[str, Builder], path: Path, settings: Settings) -> None:
    """Checks the builders' sections of a config against the recipe's signatures.

    Values are replaced by what the annotations make of them (a list for a tuple, text for a Path).

    Raises:
        ConfigError: keys that no builder takes, values of the wrong type, missing parameters; all at once.
    """
    problems: list[str] = []
    for section, name in BUILDER_SECTIONS.items():
        given: dict[str, Any] = getattr(settings.config, section)
        builder = builders.get(section)
        if builder is None:
            take_up_defaults(section, {}, settings, _from_config)
            problems += [
                f"{section}.{key} = {value!r} ({settings.place_of(f'{section}.{key}')}): {path} has no {name}(...) "
                "that takes it."
                for key, value in given.items()
            ]
            continue
        take_up_defaults(section, builder.parameters, settings, _from_config, takes_any=builder.takes_any)
        problems += _check_section(section, builder, given, settings)
        left = builder.unwritten | dict.fromkeys(supplied_names(section, builder.parameters, ()), "")
        write_defaults(section, builder.parameters, left, settings, _from_config)
        settings.defaults |= {f"{section}.{key}": value for key, value in builder.defaults().items()}
        settings.paths |= {f"{section}.{key}" for key, one in builder.parameters.items() if _is_path(one)}
    if problems:
        raise ConfigError("\n".join(problems))


def mark_secrets(module: Any, path: Path, builders: Mapping[str, Builder]) -> None:
    """Has the values of the keys that a recipe lists as `secrets` masked.

    Raises:
        RecipeError: a key is none, so that what it was to protect would be shown.
    """
    keys = getattr(module, "secrets", ())
    if not isinstance(keys, list | tuple) or not all(isinstance(key, str) and "." in key for key in keys):
        return  # some other thing of this name; a literal that is wrong was refused when the file was read
    known = [f"{section}.{name}" for section, builder in builders.items() for name in builder.parameters]
    known += leaves()
    for key in keys:
        section, name = key.split(".")[:2]
        builder = builders.get(section)
        if not (builder is not None and (builder.takes_any or name in builder.parameters)) and key not in known:
            raise RecipeError(f"{path}: secrets has {key!r}, which is not a key of the config.{nearest(key, known)}")
    mark(keys)


def own_keys(builders: Mapping[str, Builder], section: str) -> tuple[str, ...]:
    """Returns the keys of a section that are dtrain's and not its builder's."""
    builder = builders.get(section)
    return (MONITOR,) if section == "scheduler" and builder is not None and MONITOR not in builder.parameters else ()


def _check_section(section: str, builder: Builder, given: dict[str, Any], settings: Settings) -> list[str]:
    problems = []
    own = own_keys({section: builder}, section)
    for key, value in list(given.items()):
        if key in own:
            continue
        at = f"{section}.{key} = {value!r} ({settings.place_of(f'{section}.{key}')})"
        parameter = builder.parameters.get(key)
        if parameter is None:
            if not builder.takes_any:
                problems.append(f"{at}: no such parameter.{nearest(key, builder.parameters)}\n  {builder.described()}")
            continue
        try:
            given[key] = _converted(parameter, value, settings.texts.get(f"{section}.{key}", value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].replace("Input should be", "should be")
            problems.append(f"{at}: {reason}.\n  {builder.described()}")
    known = {*given, *supplied_names(section, builder.parameters, given)}
    missing = [n for n, p in builder.parameters.items() if p.default is p.empty and n not in known]
    problems += [
        f"{section}.{n} is required but not set. Write {section}.{n}=...\n  {builder.described()}" for n in missing
    ]
    return problems


def _converted(parameter: inspect.Parameter, value: Any, text: Any) -> Any:
    """Checks a value against a parameter's annotation, or, without one, against the type of its default.

    A parameter that wants text gets it as it was typed: 007 stays 007.
    """
    annotation = parameter.annotation
    if annotation is parameter.empty:
        annotation = _kind_of_default(parameter.default)
        if value is None:
            return value
        if isinstance(parameter.default, tuple) and isinstance(value, list):
            return tuple(value)
    if annotation is str and isinstance(text, str):
        return text
    if isinstance(annotation, str):
        return value  # an annotation that could not be evaluated
    strict = isinstance(value, bool) and annotation in (int, float)  # true is no number
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type with a config of its own
        adapter = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return value
    return adapter.validate_python(value, strict=strict or None)


def _from_config(parameter: inspect.Parameter, value: Any) -> Any:
    """What a parameter gets of a config's value that was not typed on a command line."""
    return _converted(parameter, value, value)


def _is_path(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a path, or several: by its annotation (`Path`, `Path | None`, `list[Path]`) or default."""
    if parameter.annotation is parameter.empty:
        return isinstance(parameter.default, PurePath)
    return _names_path(parameter.annotation)


def _names_path(annotation: Any) -> bool:
    inner = get_args(annotation)
    if inner:
        return any(_names_path(one) for one in inner)
    return isinstance(annotation, type) and issubclass(annotation, os.PathLike)


def _kind_of_default(default: Any) -> Any:
    """What a parameter without an annotation takes: numbers where its default is one, else anything."""
    kind = type(default)
    if kind is int:
        return int | float
    return kind if kind in _SCALARS else Any
