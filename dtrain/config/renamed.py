"""Keys of the config that have a new name: the old one still works, and a warning names the new one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import cache
from typing import TypeVar

from dtrain.config.sources import Value
from dtrain.errors import ConfigError
from dtrain.launch.monitor.exit_report import supervised

logger = logging.getLogger(__name__)
RENAMED = {
    "train.floor": "train.min_lr_ratio",
    "train.validate_whole": "train.gather_for_validation",
}
_BARE = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
T = TypeVar("T")


def new_name(key: str, place: str) -> str | None:
    """Returns the key that an old one, dotted or bare, is called now, and warns; None for all other keys.

    Args:
        key: as it was given.
        place: where, for the warning.
    """
    found = RENAMED.get(key, _BARE.get(key))
    if found is not None:
        _warn(key, found, place)
    return found


def with_new_names(values: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the values of a config file under today's keys.

    Raises:
        ConfigError: a key has both its old and its new name.
    """
    found: dict[str, Value] = {}
    for key, value in values.items():
        now = RENAMED.get(key)
        if now is not None and now in values:
            raise ConfigError(
                f"{key} ({value.place}) and {now} ({values[now].place}) are the same key: keep only {now}."
            )
        found[new_name(key, value.place) or key if now is not None else key] = value
    return found


def renamed(flat: Mapping[str, T]) -> dict[str, T]:
    """Returns dotted keys, such as those that an older version saved, under today's names."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}


@cache
def _warn(old: str, new: str, place: str) -> None:
    """Once for each key and place; of several ranks the first one alone, or the launcher that starts them."""
    if not supervised() and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        logger.warning("%s (%s) is now called %s: please rename it", old, place, new)
