"""Puts the sources of a config together: default, file, environment, command line; the later one wins."""

from __future__ import annotations

import os
import shlex
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dtrain.config import bundled as share
from dtrain.config import schema
from dtrain.config.calls import call_values
from dtrain.config.keeping import bring_back
from dtrain.config.keys import meant, suggestion
from dtrain.config.recipe_file import locate
from dtrain.config.renamed import new_name, with_new_names
from dtrain.config.schema import BUILDER_SECTIONS, RunConfig
from dtrain.config.sources import Value, read_environment, read_override, read_yaml, write_yaml
from dtrain.errors import ConfigError, RecipeError, nearest
from dtrain.masking import masked, secrets_of


@dataclass
class Settings:
    """A resolved config that knows where each value came from.

    Attributes:
        config: the checked config.
        places: dotted key -> where its value came from; a key that is not there has its default.
        texts: dotted key -> the value for a parameter that wants text, as it was typed.
        unplaced: bare keys of the command line that are no key of the schema: parameters of a
            builder, to be placed once the recipe's signatures are known (`place`).
        bare: bare key -> the schema's key it was taken for, to find ambiguity with a builder's parameter.
        base: folder that a relative recipe path starts from.
        defaults: dotted key -> what a builder takes where the config says nothing; once its signature is known.
        paths: dotted keys that a builder's annotation calls paths: where something is, and not what; once known.
        written: dotted key -> the same defaults in YAML's own kinds, as far as that can hold them.
        unwritten: dotted key -> why its default is not among these.
    """

    config: RunConfig
    places: dict[str, str] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)
    unplaced: dict[str, Value] = field(default_factory=dict)
    bare: dict[str, str] = field(default_factory=dict)
    base: Path = field(default_factory=Path)
    defaults: dict[str, Any] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    written: dict[str, Any] = field(default_factory=dict)
    unwritten: dict[str, str] = field(default_factory=dict)

    def place_of(self, key: str) -> str:
        """Returns where a key's value came from, "default" where nothing set it."""
        parts = key.split(".")
        parents = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        children = [name for name in self.places if name.startswith(key + ".")]
        return next((self.places[name] for name in (*parents, *children) if name in self.places), "default")

    def origin(self, key: str) -> str:
        """Returns the same in words: of a builder's default, whose it is."""
        place = self.place_of(key)
        builder = BUILDER_SECTIONS.get(key.partition(".")[0])
        return f"default of {builder}" if place == "default" and builder and key in self.defaults else place

    def recorded_defaults(self) -> list[str]:
        """Returns the keys whose values a run's config calls defaults of the recipe, and nothing has replaced since."""
        file = self.place_of("defaults").rpartition(":")[0]
        return [key for key in self.config.defaults if self.places.get(key, "").rpartition(":")[0] == file]

    def place(self, signatures: Mapping[str, Sequence[str]]) -> None:
        """Gives each bare key of the command line to the one builder that has a parameter of that name.

        Args:
            signatures: section ("model", "data", ...) -> names of its builder's parameters.

        Raises:
            ConfigError: no builder has the parameter, or more than one key has that name.
        """
        for key, value in self.unplaced.items():
            homes = [section for section, names in signatures.items() if key in names]
            if not homes:
                known = [leaf.rpartition(".")[2] for leaf in schema.leaves()]
                known += [name for names in signatures.values() for name in names]
                raise ConfigError(_unknown_bare(key, value, known, signatures, self.config.recipe))
            _refuse_ambiguous(key, [f"{home}.{key}" for home in homes])
            self._refuse_twice(f"{homes[0]}.{key}", key, value)
            getattr(self.config, homes[0])[key] = value.value
            self.places[f"{homes[0]}.{key}"] = value.place
            self.texts[f"{homes[0]}.{key}"] = value.text()
        self.unplaced = {}
        for key, taken_for in self.bare.items():
            homes = [f"{section}.{key}" for section, names in signatures.items() if key in names]
            _refuse_ambiguous(key, [taken_for, *homes])

    def _refuse_twice(self, full: str, key: str, value: Value) -> None:
        """Refuses one parameter given by both its names, of which the order was not kept."""
        given = self.places.get(full)
        if given == value.place and self.texts[full] != value.text():
            raise ConfigError(
                f"{key} = {value.raw} and {full} = {self.texts[full]} ({given}) are one parameter. Give it once."
            )

    def pin(self) -> None:
        """Has the recipe's file mean the same after a change of the working directory."""
        if locate(self.config.recipe, self.base) is not None:
            found = (self.base / self.config.recipe).is_file()
            self.base = (self.base if found else Path()).absolute()

    def to_yaml(self) -> str:
        """Returns the resolved config as YAML, readable by `load_settings` from any folder.

        A recipe's file is named in full: it may have been given relative to the folder of a config, or to the
        one in which the run was started.
        """
        left = ", ".join(f"{key} ({why})" for key, why in self.unwritten.items())
        note = f"# Defaults of the recipe that are not above: {left}\n" if left else ""
        return f"{write_yaml(self.plain())}{note}"

    def plain(self) -> dict[str, Any]:
        """Returns the resolved config in YAML's and JSON's own kinds, as `to_yaml` writes it: secrets are masked."""
        try:
            path = locate(self.config.recipe, self.base)
        except RecipeError:  # moved since it was loaded
            path = self.base / self.config.recipe
        recipe = self.config.recipe if path is None else str(path.resolve())
        plain: dict[str, Any] = masked("", plain_value(self.config.model_dump() | {"recipe": recipe}))
        defaults = self._add_defaults(plain)
        del plain["defaults"]
        plain |= {"defaults": defaults} if defaults else {}
        if self.config.train.init_from is not None:
            plain["train"]["init_from"] = str(Path(self.config.train.init_from).expanduser().absolute())
        del plain["checkpoint"]["accept"]  # what one command accepts is not accepted ever after
        return plain

    def _add_defaults(self, plain: dict[str, Any]) -> list[str]:
        """Adds the builders' defaults to a plain config; returns the keys of it that are such."""
        found = self.recorded_defaults()
        for key, value in self.written.items():
            section, _, name = key.partition(".")
            if name not in plain[section]:
                plain[section][name] = value
                found.append(key)
        return found

    def secrets(self) -> dict[str, Any]:
        """Returns dotted key -> value of the secrets, which `plain` masks; those of bare keys under these."""
        bare = {key: value.text() for key, value in self.unplaced.items()}
        return {**secrets_of("", bare), **secrets_of("", plain_value(self.config.model_dump()))}


_MOST_LISTED = 12  # parameters of a recipe that a message names
_STEP = "step"  # a section, and a name that builders' parameters have: step=plain is model.step=plain


def load_settings(target: str | None, overrides: Sequence[str], environ: Mapping[str, str] | None = None) -> Settings:
    """Resolves a run's config.

    Args:
        target: a YAML config, a recipe (.py file or module), the name of a bundled config, or None.
        overrides: `key=value` of the command line; keys dotted, or a leaf's bare name.
        environ: environment variables, by default the process's.

    Raises:
        ConfigError: a file, key or value is wrong; the message has key, value, place and what is valid.
    """
    values, base = _read_target(target)
    values = with_new_names(values)
    values |= {_full_key(k, v): v for k, v in read_environment(os.environ if environ is None else environ).items()}
    settings = Settings(config=RunConfig(), base=base)
    for text in overrides:
        key, value = read_override(text)
        full = None if key == _STEP and not isinstance(value.value, (dict, type(None))) else _match(key, value)
        if full is None:
            settings.unplaced[key] = value
            continue
        if full != key and "." not in key:
            settings.bare[key] = full
        values[full] = value
        if full == "recipe":
            settings.base = Path()
    bring_back(values, settings, target)
    settings.places = {key: value.place for key, value in values.items()}
    settings.texts = {key: value.text() for key, value in values.items()}
    settings.config = _check(values)
    _refuse_idle(settings)
    return settings


def call_settings(
    call: str, run: str | Path, own: Mapping[str, tuple[Any, str]], more: Mapping[str, Any] | None
) -> Settings:
    """Returns the config of a call such as `train_model(..., run=...)`; see `dtrain.config.calls.call_values`."""
    values = call_values(call, run, own, more, _full_key)
    settings = Settings(config=_check(values), places={key: value.place for key, value in values.items()})
    _refuse_idle(settings)
    return settings


def plain_value(value: Any) -> Any:
    """Returns a value in YAML's own kinds: a parameter may have become a tuple, a path or an enum member."""
    if isinstance(value, dict):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_value(inner) for inner in value]
    if isinstance(value, Enum):
        return plain_value(value.value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _read_target(target: str | None) -> tuple[dict[str, Value], Path]:
    """Returns the values that the command's first word stands for, and the folder of relative paths."""
    if target is None:
        return {}, Path()
    path = Path(target)
    if path.suffix in (".yaml", ".yml"):
        found = share.find(target)
        return read_yaml(found), found.parent
    if path.suffix != ".py" and not path.exists() and "/" not in target:
        bundled = share.config_named(target)
        if bundled is not None:
            return read_yaml(bundled), bundled.parent
    return {"recipe": Value(target, "command line", raw=target)}, Path()


def _full_key(key: str, value: Value) -> str:
    """Checks a full dotted key from the environment."""
    full = _match(key, value)
    if full is None:
        raise ConfigError(f"{key} ({value.place}) is not a key of the config. {_valid_sections()}")
    return full


def _match(key: str, value: Value) -> str | None:
    """Finds the full key for a dotted or bare one; None for a bare name that the schema does not have."""
    section, dot, rest = key.partition(".")
    if dot and rest and section in BUILDER_SECTIONS:
        return key
    if (now := new_name(key, value.place)) is not None:
        return now
    found = [leaf for leaf in schema.leaves() if leaf == key or leaf.endswith("." + key)]
    _refuse_ambiguous(key, found)
    if found:
        return found[0]
    if not dot and key not in RunConfig.model_fields:
        return None
    if section in RunConfig.model_fields:
        return key  # the check of the whole section names what is wrong with it
    raise ConfigError(
        f"{key} = {value.raw} ({value.place}): there is no section {section!r}."
        f"{meant(key) or nearest(section, RunConfig.model_fields)} {_valid_sections()}"
    )


def _refuse_ambiguous(key: str, homes: list[str]) -> None:
    if len(homes) > 1:
        raise ConfigError(f"{key} is ambiguous: write it in full as one of {', '.join(homes)}.")


def _check(values: Mapping[str, Value]) -> RunConfig:
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{dotted} ({value.place}): {parent} is a value ({child!r}), not a section.")
            node = child
        node[leaf] = _as_wanted(dotted, value)
    tree = {key: ({} if node is None and key != "recipe" else node) for key, node in tree.items()}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(item, values) for item in error.errors())) from None


def _refuse_idle(settings: Settings) -> None:
    """Refuses early stopping's other keys without a patience or a target; a null says that there is none."""
    early = settings.config.early_stopping
    for key in (f"early_stopping.{name}" for name in ("monitor", "mode") if getattr(early, name) is not None):
        if all(settings.place_of(f"early_stopping.{name}") == "default" for name in ("patience", "target")):
            raise ConfigError(
                f"{key} = {getattr(early, key.rpartition('.')[2])!r} ({settings.place_of(key)}) has no effect without "
                "early_stopping.patience. Set it, such as early_stopping.patience=5, or a target; or did you mean "
                f"checkpoint.{key.rpartition('.')[2]}?"
            )


def _as_wanted(dotted: str, value: Value) -> Any:
    """A key that wants text gets it as typed: run.name=007 is "007", not 7."""
    annotation = schema.leaves().get(dotted)
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = [get_args(o)[0] if hasattr(o, "__metadata__") else o for o in options]
    return value.text() if str in kinds else value.value


def _describe(item: Any, values: Mapping[str, Value]) -> str:
    """One pydantic error as key, value, place, reason and what is valid."""
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    place = next((v.place for k, v in values.items() if k == key or k.startswith(key + ".")), "default")
    section = _section_at(parts[:-1])
    if item["type"] == "extra_forbidden":
        known = [n for n in section.model_fields if n != parts[-1]]
        listed = f"`dtrain keys{''.join(f' {one}' for one in parts[:-1][:1])}` lists all."
        return (
            f"{key} = {item['input']!r} ({place}): there is no key {parts[-1]!r}."
            f"{_in_section(parts) or suggestion(parts[-1], known)} {listed}"
        )
    if item["type"] == "missing":
        return f"{key} is required but not set. Write {key}=..."
    if item["type"] == "int_type" and isinstance(item["input"], float) and item["input"].is_integer():
        return f"{key} = {item['input']!r} ({place}): should be a whole number: {key}={int(item['input'])}."
    reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if item["type"] in ("model_type", "dict_type") and len(parts) < 3:
        return f"{key} = {item['input']!r} ({place}): should be a section: {_example(parts)}."
    field_ = section.model_fields.get(parts[-1])
    default = field_.get_default(call_default_factory=True) if field_ is not None else None
    shown = f" (default: {default})" if not isinstance(default, BaseModel) and default is not None else ""
    return f"{key} = {item['input']!r} ({place}): {reason}{shown}."


def _in_section(parts: Sequence[str]) -> str:
    """Names the section of a key that stands at the top of a file, or in the wrong one."""
    homes = [leaf for leaf in schema.leaves() if leaf.endswith(f".{parts[-1]}")]
    if len(homes) != 1:
        return ""
    section = homes[0].rpartition(".")[0]
    return f" It belongs to {section}: write {homes[0]}, or put it below `{section}:` in a file."


def _example(parts: Sequence[str]) -> str:
    """A key of a section as it is written: track.wandb.project=NAME."""
    section = _section_at(parts)
    if parts[-1] in BUILDER_SECTIONS or section is RunConfig:
        return f"{'.'.join(parts)}.KEY=VALUE"
    name, field_ = next(iter(section.model_fields.items()))
    default = field_.get_default()
    value = default if isinstance(default, int) else "NAME" if name == "project" else "VALUE"
    return f"{'.'.join((*parts, name))}={value}"


def _section_at(parts: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for part in parts:
        field_ = section.model_fields.get(part)
        inner = schema.section_of(field_.annotation) if field_ is not None else None
        if inner is None:
            break
        section = inner
    return section


def _unknown_bare(
    key: str, value: Value, known: list[str], signatures: Mapping[str, Sequence[str]], recipe: str
) -> str:
    own = [name for names in signatures.values() for name in names]
    near = _same_parameter(key, own) or suggestion(key, known)
    takes = f" The recipe takes {', '.join(own)}." if 0 < len(own) <= _MOST_LISTED and not near else ""
    return (
        f"{key} = {value.raw} ({value.place}): neither the config nor the recipe has a key {key!r}."
        f"{near}{takes} `{shlex.join(['dtrain', 'keys', recipe])}` lists all."
    )


def _same_parameter(key: str, own: Sequence[str]) -> str:
    """Names a parameter of the recipe that is called otherwise elsewhere: lr for learning_rate."""
    words = meant(key)
    same = [name for name in own if words and name != key and meant(name) == words]
    return f" Did you mean {same[0]!r}?" if same else ""


def _valid_sections() -> str:
    return f"Valid are {', '.join(name for name in RunConfig.model_fields if name != 'defaults')}."
