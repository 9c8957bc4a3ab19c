"""Reads config values from YAML files, the environment and the command line, with their places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dtrain.config.bounded import MOST_BYTES, VALUE_ERRORS, check_bounds, problem_of
from dtrain.errors import ConfigError
from dtrain.files import read_text_below
from dtrain.masking import MASK, brought, note

ENVIRONMENT_PREFIX = "DTRAIN_"
_MOST_DIGITS = 1000
_LONGEST_SHOWN = 200  # characters of a value, in messages


class _Loader(yaml.SafeLoader):
    """YAML with the scalars people mean: 1e-3 is a number; yes, no, on and off are words."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Returns an integer that fits 64 bits, as those of torch do."""
        value: int = super().construct_yaml_int(node) if len(node.value) <= _MOST_DIGITS else 1 << 64
        if abs(value) >= 1 << 64:
            raise yaml.constructor.ConstructorError(
                problem="an integer of more than 64 bits", problem_mark=node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":bool", ":int", ":float", ":timestamp", ":merge"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:e[-+]?\d+)?|\.\d[\d_]*(?:e[-+]?\d+)?|\d[\d_]*e[-+]?\d+|\.inf|\.nan)$", re.I
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same: text that it would take for a number is quoted."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def write_yaml(tree: dict[str, Any]) -> str:
    """Returns a tree of plain values as YAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_written(value: Any) -> Any:
    """Returns what a config has after a plain value was written into it."""
    return yaml.load(write_yaml({"value": value}), Loader=_Loader)["value"]  # noqa: S506 - a subclass of SafeLoader


@dataclass(frozen=True)
class Value:
    """One value with the place it came from.

    Attributes:
        value: the value as YAML reads it.
        place: where from, in words: "train.yaml:7", "command line", "environment DTRAIN_RUN__DIR".
        raw: the text as it was typed, for keys that want text; None for a file's values.
    """

    value: Any
    place: str
    raw: str | None = None

    def text(self) -> Any:
        """Returns the value for a key that wants text: as it was typed, 007 stays 007; quotes still quote."""
        if self.raw is None or self.value is None or self.raw.lstrip().startswith(("'", '"')):
            return self.value
        return self.raw


def read_scalar(key: str, text: str, place: str) -> Value:
    """Reads the right side of a `key=value`: a number, true, null, [lists] and {mappings}, or text."""
    note(key, text)
    if text.startswith(MASK):  # of a secret, which is put back once the run is known
        return Value(text, place, raw=text)
    try:
        check_bounds(text)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, *VALUE_ERRORS) as error:
        raise ConfigError(
            f"{key} = {_shortened(text)} ({place}): cannot be read as YAML: {problem_of(error)}. Quote text that "
            "contains quotes or brackets."
        ) from None
    note(key, value)
    return Value(value, place, raw=text)


def read_yaml(path: Path) -> dict[str, Value]:
    """Reads a config file.

    Returns:
        dotted key -> value with its line, down to one key below the sections' own.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or names a key twice.
    """
    text = _text_of(path)
    try:
        check_bounds(text)
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(_unreadable(path, error)) from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: a config should be a mapping of sections, such as 'train:', not {_kind(root)}.")
    return _flatten(root, loader, path, "")


def _text_of(path: Path) -> str:
    try:
        real = path.resolve()  # a link that a person named is followed
        return read_text_below(real.parent, real.name, MOST_BYTES).removeprefix("\ufeff")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the config is not UTF-8 text (byte {error.start}).") from None
    except RuntimeError:  # Python before 3.13, of links that lead to one another
        raise ConfigError(f"{path}: cannot read the config: the link points to itself.") from None


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _unreadable(path: Path, error: yaml.YAMLError) -> str:
    """What is wrong with a file that is no YAML, with the line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f"{path}: not valid YAML: {error}"
    if r"'\t'" in problem:
        return f"{path}:{mark.line + 1}: indent with spaces, not tabs."
    context = getattr(error, "context", None)
    return f"{path}:{mark.line + 1}: not valid YAML: {f'{context}: ' if context else ''}{problem}."


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _flatten(node: yaml.MappingNode, loader: _Loader, path: Path, prefix: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a config key should be text, not a list or a mapping.")
        key = str(key_node.value)
        if key in seen:
            raise ConfigError(f"{path}:{line}: {prefix}{key} is set twice; first in line {seen[key]}.")
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode) and value_node.value and _is_section(prefix + key):
            deeper = _flatten(value_node, loader, path, f"{prefix}{key}.")
            twice = next((name for name in deeper if name in found), None)
            if twice is not None:
                raise ConfigError(f"{deeper[twice].place}: {twice} is set twice; first at {found[twice].place}.")
            found |= deeper
        else:
            try:
                value = loader.construct_object(value_node, deep=True)
            except (yaml.YAMLError, *VALUE_ERRORS) as error:
                raise ConfigError(
                    f"{path}:{line}: {prefix}{key}: cannot be read as YAML: {problem_of(error)}."
                ) from None
            if prefix + key in found:
                raise ConfigError(f"{path}:{line}: {prefix}{key} is set twice; first at {found[prefix + key].place}.")
            note(prefix + key, value)
            found[prefix + key] = Value(value, f"{path}:{line}")
    return found


def _is_section(dotted: str) -> bool:
    """Whether a mapping under this key is a section of ours; deeper ones are a builder's own value."""
    return "." not in dotted or dotted in ("track.wandb", "track.mlflow", "track.trackio")


def read_environment(environ: Mapping[str, str]) -> dict[str, Value]:
    """Reads DTRAIN_SECTION__KEY=value variables; other variables are not looked at."""
    found: dict[str, Value] = {}
    for name, text in environ.items():
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
            dotted = name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".")
            found[dotted] = read_scalar(dotted, text, f"environment {name}")
    return found


def read_override(text: str) -> tuple[str, Value]:
    """Splits one `key=value` of the command line."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{text!r} (command line) is not a key=value pair. Write it like train.epochs=5.")
    return key, read_scalar(key, brought(key, raw), "command line")
