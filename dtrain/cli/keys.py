"""`dtrain keys`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import piped, reported

if TYPE_CHECKING:
    from dtrain.config.keys import Key

_LEAST = 40  # characters of a line


def keys(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG | RECIPE.py] [SECTION ...]",
            help="A config or a recipe, whose parameters are then listed, too; and sections such as train, or keys. "
            "Default: all sections.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the keys of a config: default, what each may be, and what it does.

    Examples: dtrain keys; dtrain keys checkpoint; dtrain keys my_recipe.py; dtrain keys digits optimizer
    """
    with reported(), piped():
        typer.echo(table(*_found(words or []), width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 80))


def _found(words: Sequence[str]) -> tuple[list[Key], bool]:
    """Returns the keys that are asked for, and whether they include a recipe's."""
    from dtrain.config import BUILDER_SECTIONS
    from dtrain.config.keys import keys_of, suggestion
    from dtrain.config.schema import RunConfig
    from dtrain.errors import UsageError

    known = list(keys_of())
    sections = [name for name in RunConfig.model_fields if name != "defaults"]
    target = words[0] if words and words[0] not in sections and not any(one.name == words[0] for one in known) else None
    asked = words[1:] if target is not None else words
    if target is not None and _is_no_target(target):
        raise UsageError(
            f"{target}: no section, key, config or recipe.{suggestion(target, [*sections, *(k.name for k in known)])} "
            f"Sections: {', '.join(sections)}."
        )
    own = _of_recipe(target) if target is not None else []
    for word in asked:
        if word not in sections and not any(word in {one.name, one.name.rpartition(".")[2]} for one in [*own, *known]):
            raise UsageError(f"{word}: no section or key.{suggestion(word, sections)} Sections: {', '.join(sections)}.")
    every = [*(one for one in known if one.name == "recipe"), *own]
    every += [one for one in known if one.name not in ("recipe", "defaults")]
    chosen = [one for one in every if not asked or any(_is_asked(one.name, word) for word in asked)]
    if not chosen:
        builder = BUILDER_SECTIONS[asked[0]]
        raise UsageError(f"{asked[0]}.* are parameters of {builder}: `dtrain keys RECIPE.py {asked[0]}`.")
    return chosen, target is not None


def _is_asked(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}.") or name.rpartition(".")[2] == word


def _is_no_target(word: str) -> bool:
    """Whether a word cannot stand for a config or a recipe: what looks like one is left to what reads it."""
    from importlib.util import find_spec
    from pathlib import Path

    from dtrain.config.bundled import config_named

    if "/" in word or word.endswith((".py", ".yaml", ".yml", ".ipynb")) or Path(word).exists() or config_named(word):
        return False
    try:
        return find_spec(word) is None
    except (ImportError, ValueError):
        return True


def _of_recipe(target: str) -> list[Key]:
    """Returns the parameters of a recipe's functions; it is imported for that."""
    from dtrain.cli.train import read_target
    from dtrain.recipe.keys import parameter_keys
    from dtrain.recipe.loader import load_recipe

    settings = read_target([target])
    return parameter_keys(load_recipe(settings.config.recipe, settings.base), settings)


def table(found: Sequence[Key], recipe: bool, *, width: int) -> str:
    """Returns the keys, two lines each: name, default and what it may be; below that what it does."""
    indent = "    "
    lines = []
    for one in found:
        lines.append(f"{one.name}{f' = {one.default}' if one.default else ''}  ({one.kind})")
        room = max(width, _LEAST) - len(indent)
        lines += [indent + line for line in textwrap.wrap(one.words, room, break_on_hyphens=False)]
    note = "" if recipe else "\nWith a recipe, its own parameters are listed, too: dtrain keys RECIPE.py"
    return "\n".join(lines) + note
