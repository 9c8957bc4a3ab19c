"""A recipe's parameters as keys of a config, for people."""

from __future__ import annotations

import inspect
from typing import Any

from dtrain.config import BUILDER_SECTIONS, Settings
from dtrain.config.keys import Key, yaml_word
from dtrain.config.settings import plain_value
from dtrain.masking import masked
from dtrain.recipe.loader import Recipe
from dtrain.recipe.supplied import supplied_names


def parameter_keys(recipe: Recipe, settings: Settings) -> list[Key]:
    """Returns the parameters of the recipe's functions that a config sets.

    Args:
        recipe: it was imported.
        settings: the config, whose values stand for the defaults where it has some.
    """
    found = []
    for section, name in BUILDER_SECTIONS.items():
        builder = recipe.builders.get(section)
        if builder is None:
            continue
        given: dict[str, Any] = getattr(settings.config, section)
        supplied = supplied_names(section, builder.parameters, given)
        for key, parameter in builder.parameters.items():
            value = given.get(key, parameter.default)
            required = value is parameter.empty and key not in supplied
            none = value is None or value is parameter.empty  # an array would compare each of its values
            shown = "" if none else yaml_word(masked(f"{section}.{key}", plain_value(value)))
            words = f"of {name}" + (", required" if required else ", which dtrain fills in" * (key in supplied))
            found.append(Key(f"{section}.{key}", shown, _kind(parameter), words))
    return found


def _kind(parameter: inspect.Parameter) -> str:
    """Returns a parameter's annotation as it is written, or else the kind of its default."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        plain = parameter.default is parameter.empty or parameter.default is None
        return "anything" if plain else type(parameter.default).__name__
    return inspect.formatannotation(annotation)
