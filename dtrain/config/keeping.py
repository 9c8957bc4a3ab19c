"""The one file of a run's folder that holds its secrets, `secrets.json`: written, and put back into a config."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.config.recipe_file import secrets_in
from dtrain.config.sources import Value
from dtrain.errors import ConfigError
from dtrain.files import PRIVATE, folder_opened, read_below, write_below
from dtrain.layout import SECRETS
from dtrain.masking import is_masked, mark, note, restored

if TYPE_CHECKING:
    from dtrain.config.settings import Settings

logger = logging.getLogger(__name__)

_MOST_BYTES = 1 << 20


def write_secrets(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes the secrets of a run, for its owner alone; where there are none, there is no file.

    Raises:
        OSError: it cannot be written.
    """
    before = _kept(folder)
    for key in (key for key, value in found.items() if before.get(key, value) != value):
        logger.warning(
            "%s differs from the run's value. It is a masked secret and not compared further: if it selects the data, "
            "results may change.",
            key,
        )
    if found:
        write_below(folder, SECRETS, json.dumps(found, indent=1) + "\n", mode=PRIVATE)
        return
    with contextlib.suppress(FileNotFoundError), folder_opened(folder):
        (folder / SECRETS).unlink()


def bring_back(values: dict[str, Value], settings: Settings, target: str | None) -> None:
    """Puts secrets that are masked back into a config: those of the run whose config or folder it names.

    Args:
        values: dotted key -> value, changed in place.
        settings: their unplaced ones are, too; and the recipe's marks are noted.
        target: what the command's first word named.

    Raises:
        ConfigError: a value is masked, and what it stands for is not known.
    """
    _mark(values, settings.unplaced, settings.base)
    both = (values, settings.unplaced)
    if not any(is_masked(key, value.value) for part in both for key, value in part.items()):
        return
    folders = [Path(target).parent] if target is not None and target.endswith((".yaml", ".yml")) else []
    name = values["run.name"].text() if "run.name" in values else None
    if isinstance(name, str):
        runs = values["run.dir"].text() if "run.dir" in values else "runs"
        folders.append(Path(str(runs)).expanduser() / name)
    kept = {key: value for folder in folders for key, value in _kept(folder).items()}
    for part in both:
        for key, value in part.items():
            part[key] = _restored(key, value, kept)


def _restored(key: str, value: Value, kept: Mapping[str, Any]) -> Value:
    if not is_masked(key, value.value):
        return value
    # A word of the command line is kept under its own name, a config's value under its whole one.
    names = {**kept, key: kept[leaf]} if (leaf := key.rpartition(".")[2]) in kept and key not in kept else kept
    found = restored(key, value.value, names)
    if is_masked(key, found):
        raise ConfigError(
            f"{key} ({value.place}) is masked, and its value is not in {SECRETS} of the run's folder (or that file "
            f"is another user's). Pass {key}=..., or set DTRAIN_{key.replace('.', '__').upper()}."
        )
    note(key, found)
    return replace(value, value=found, raw=found if value.raw is not None and isinstance(found, str) else None)


def _kept(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_below(folder, SECRETS, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _mark(values: Mapping[str, Value], unplaced: Mapping[str, Value], base: Path) -> None:
    """Notes what the recipe's file marks as secret; it is not run for that."""
    recipe = values["recipe"].text() if "recipe" in values else None
    if isinstance(recipe, str) and recipe.endswith(".py"):
        for path in (base / recipe, Path(recipe)):
            if path.is_file():
                mark(secrets_in(path))
                for key, value in (*values.items(), *unplaced.items()):
                    note(key, value.value)
                return
