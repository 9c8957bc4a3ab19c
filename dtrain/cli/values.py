"""Verbs that take values as `key=value`, and say so where one is written as an option."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand


class TakesValues(TyperCommand):
    """A verb whose words are a config or a recipe (or a run) and values of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever; but an option that there is not, and that is a value's name, is answered with how to write it."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", None)  # click's NoSuchOption, of which typer has a copy of its own
            if option is not None and hasattr(error, "possibilities"):
                _add_remedy(error, option, given)
            raise

    def invoke(self, ctx: Any) -> Any:
        """As ever, after a word on variables that were probably meant for this verb."""
        warn_ignored_variables()
        return super().invoke(ctx)


def warn_ignored_variables() -> None:
    """Says which DTRAIN_ variables of the environment nothing reads; the first rank alone does, or who starts ranks."""
    from dtrain.launch.monitor.exit_report import supervised

    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if supervised() or rank != "0" or not any(name.startswith("DTRAIN_") for name in os.environ):
        return
    from dtrain.config.variables import ignored_variables

    for words in ignored_variables(os.environ):
        typer.echo(f"dtrain: {words}", err=True)


def _add_remedy(error: Any, option: str, args: Sequence[str]) -> None:
    key = option.lstrip("-").replace("-", "_")
    if _is_key(key, args):
        error.message += f". Write values without dashes: {key}={_value_of(option, args)}"
        error.possibilities = []
    elif words := _meant(key, option, args):
        error.message += f".{words}"
        error.possibilities = []
    elif not error.possibilities:
        error.message += ". Write config and recipe values without dashes: epochs=5"


def _meant(key: str, option: str, args: Sequence[str]) -> str:
    """Says what another library's name for an option or a key is called here; nothing for any other word."""
    from dtrain.config.keys import alias_of, meant

    same = alias_of(key)
    return meant(key) if same is None else f" Write values without dashes: {same}={_value_of(option, args)}"


def _value_of(option: str, args: Sequence[str]) -> str:
    """Returns what was given with an option, or dots."""
    for place, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name == option:
            after = args[place + 1] if place + 1 < len(args) else "..."
            return value if equals else "..." if after.startswith("--") or "=" in after else after
    return "..."


def _is_key(key: str, args: Sequence[str]) -> bool:
    """Whether it is a key of the config, or a parameter of the recipe that the words name."""
    from dtrain.config import BUILDER_SECTIONS
    from dtrain.config.schema import leaves

    section, dot, parameter = key.rpartition(".")
    if any(leaf == key or leaf.endswith(f".{key}") for leaf in leaves()):
        return True
    if dot and section not in BUILDER_SECTIONS:
        return False
    return parameter in _parameters(args)


def _parameters(args: Sequence[str]) -> set[str]:
    """Returns the names of the parameters of the recipe's builders, as far as its file tells; nothing is imported."""
    from dtrain.config import BUILDER_SECTIONS
    from dtrain.config.recipe_file import bundled, locate, parameters_in
    from dtrain.errors import DtrainError

    try:
        settings = _settings(args)
        recipe = settings.config.recipe
        path = locate(recipe, settings.base) or bundled(recipe)
        return set() if path is None else parameters_in(path, BUILDER_SECTIONS.values())
    except DtrainError:  # what is wrong with the words is told once the option is right
        return set()


def _settings(args: Sequence[str]) -> Any:
    """Reads the config, the recipe or the run that is among the words."""
    from pathlib import Path

    from dtrain.cli.train import split_words
    from dtrain.config import load_settings
    from dtrain.config.bundled import config_named
    from dtrain.layout import CONFIG

    for word in args:
        if (Path(word) / CONFIG).is_file():
            return load_settings(str(Path(word) / CONFIG), [], {})
        if (word.endswith((".py", ".yaml", ".yml")) and "=" not in word) or config_named(word) is not None:
            return load_settings(word, [], {})
    target, overrides = split_words([word for word in args if word.startswith("recipe=")])
    return load_settings(target, overrides, {})
