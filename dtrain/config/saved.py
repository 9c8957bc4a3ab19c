"""A run's folder, read again: its config, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtrain.config.settings import Settings, load_settings
from dtrain.errors import UsageError, nearest
from dtrain.files import what_is
from dtrain.layout import CONFIG


def load_run_settings(folder: Path, overrides: Sequence[str]) -> Settings:
    """Reads the config that a run was trained with.

    The environment's DTRAIN_ variables are left out: the run's values are what its weights belong to.

    Args:
        folder: the run's folder.
        overrides: `key=value` that replace the run's values, such as data.batch_size=8.

    Raises:
        UsageError: there is no such folder, or it is no run's.
        ConfigError: the config or an override is wrong.
    """
    if not folder.is_dir():
        parent = folder.parent
        there = sorted(p.parent.name for p in parent.glob(f"*/{CONFIG}")) if parent.is_dir() else []
        known = f" Runs in {parent}: {', '.join(there[-5:])}." if there else ""
        raise UsageError(f"{folder}: no such run.{nearest(folder.name, there)}{known}")
    file = folder / CONFIG
    if not file.is_file():
        raise UsageError(
            f"{folder} is not a run's folder: it has no {CONFIG}. Use the folder that `dtrain train` printed as `run:`."
        )
    check_plain(file)
    return load_settings(str(file), overrides, {})


def check_plain(file: Path) -> None:
    """Whether a run's config is a file of its own: below a run's folder no link is followed.

    Raises:
        UsageError: it is something else.
    """
    kind = what_is(file)
    if kind:
        raise UsageError(f"{file}: it is {kind}. Restore the run's own file.")
