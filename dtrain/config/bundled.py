"""Finds the files that travel with dtrain: run configs, launch profiles, batch templates.

A checkout has them at its top; a wheel carries them in ``dtrain/share``.
"""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.errors import ConfigError, nearest
from dtrain.version import PACKAGE

FOLDERS = ("configs", "launch", "slurm")
OWN_CONFIG = "train.yaml"  # of the current folder: what a command that names nothing runs


def folder(name: str) -> Path:
    """Returns the folder `configs`, `launch` or `slurm` that belongs to this dtrain."""
    installed = PACKAGE / "share" / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def config_named(name: str) -> Path | None:
    """Returns the bundled config of that name ("digits"), if there is one."""
    path = folder("configs") / f"{name}.yaml"
    return path if path.is_file() else None


def find(name: str) -> Path:
    """Finds a file by its path, or, where that is not there, the bundled one of that path.

    Raises:
        ConfigError: neither is there; the message names what is.
    """
    path = Path(name)
    if os.path.lexists(path):  # whoever reads it says what is wrong with something else than a file
        return path
    if len(path.parts) == 2 and path.parts[0] in FOLDERS:
        bundled = folder(path.parts[0]) / path.name
        if bundled.is_file():
            return bundled
    here = sorted(str(p) for p in Path(path.parent).glob("*.y*ml")) if path.parent.is_dir() else []
    bundled_names = [f"configs/{p.name}" for p in sorted(folder("configs").glob("*.yaml"))]
    raise ConfigError(
        f"{name}: no such file (looked in {Path.cwd()}).{nearest(name, here + bundled_names)} "
        f"Bundled: {', '.join(bundled_names)}."
    )
