"""The defaults of a recipe's builders as a run's config.yaml has them, so that a run keeps the values it began with.

`config.yaml` has every default that YAML can hold, and lists under `defaults` which of its values are such. Read again
with the same recipe, these are the builders' own as before; one that has changed in the recipe keeps the run's value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from dtrain.config import Settings
from dtrain.config.settings import plain_value
from dtrain.config.sources import read_written
from dtrain.launch.env.rank_env import read_rank_facts
from dtrain.masking import masked

logger = logging.getLogger(__name__)

_LONGEST = 2000  # characters of a default that is written

Convert = Callable[[Parameter, Any], Any]


def take_up_defaults(
    section: str, parameters: Mapping[str, Parameter], settings: Settings, convert: Convert, *, takes_any: bool = False
) -> None:
    """Takes the values of a run's config that were defaults for what they are now.

    One that still is the default is left to the builder. One that is not stays, since the run was trained with it; and
    one of a parameter that is gone is left out. A warning tells of both.

    Args:
        section: of the config.
        parameters: of its builder, by name.
        settings: the config; the section is changed in place.
        convert: makes a parameter's value of what YAML holds, or raises.
        takes_any: whether the builder has **kwargs.
    """
    given: dict[str, Any] = getattr(settings.config, section)
    for key in settings.recorded_defaults():
        name = key.partition(".")[2]
        if not key.startswith(f"{section}.") or name not in given or (takes_any and name not in parameters):
            continue
        parameter, place = parameters.get(name), settings.place_of(key)
        if parameter is None:
            _warn("%s = %r (%s): a default that the recipe no longer has; left out", key, given[name], place)
        elif is_same(_made(convert, parameter, given[name]), parameter.default):
            pass
        else:
            new = "gone" if parameter.default is Parameter.empty else f"{parameter.default!r} now"
            _warn("%s = %r (%s): a default of then, and kept; the recipe's is %s", key, given[name], place, new)
            continue
        del given[name]
        settings.places.pop(key, None)
        settings.texts.pop(key, None)


def write_defaults(
    section: str, parameters: Mapping[str, Parameter], left: Mapping[str, str], settings: Settings, convert: Convert
) -> None:
    """Notes which defaults of a section are written, and which YAML cannot hold.

    Args:
        section: of the config.
        parameters: of its builder, by name.
        left: parameters that are not written -> why, in words; an empty text needs none.
        settings: the config, whose `written` and `unwritten` are added to.
        convert: as for `take_up_defaults`.
    """
    for name, parameter in parameters.items():
        key, default = f"{section}.{name}", parameter.default
        if default is Parameter.empty:
            continue
        if name in left:
            settings.unwritten |= {key: left[name]} if left[name] else {}
            continue
        plain, found = _written(convert, parameter)
        if not is_same(found, default):
            settings.unwritten[key] = f"YAML cannot hold this {type(default).__name__}"
        elif len(str(plain)) > _LONGEST:
            settings.unwritten[key] = "long"
        elif not is_same(masked(key, plain), plain):
            settings.unwritten[key] = "a secret"
        else:
            settings.written[key] = plain


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are of one type and are written alike: True is not 1, nor is a list a tuple."""
    return type(one) is type(other) and repr(one) == repr(other)


def _written(convert: Convert, parameter: Parameter) -> tuple[Any, Any]:
    """Returns a default in YAML's own kinds, and what the builder would get if it were read again."""
    try:
        plain = plain_value(parameter.default)
        return plain, convert(parameter, read_written(plain))
    except Exception:  # noqa: BLE001 - the default may be an object of any class
        return None, Parameter.empty


def _made(convert: Convert, parameter: Parameter, value: Any) -> Any:
    try:
        return convert(parameter, value)
    except Exception:  # noqa: BLE001 - an annotation of the user's may raise anything of a value
        return Parameter.empty


def _warn(words: str, *values: Any) -> None:
    if read_rank_facts().rank == 0:
        logger.warning(words, *values)
