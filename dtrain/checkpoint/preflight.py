"""Whether a run's folder will be gone on with, looked at before a job waits in a queue for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtrain.checkpoint.code import check_code
from dtrain.checkpoint.compat import check_facts, check_ranks, differences_before_training, recipe_name
from dtrain.checkpoint.folder import MANIFEST
from dtrain.config import Settings, load_settings
from dtrain.errors import UsageError
from dtrain.layout import CHECKPOINTS, CONFIG, checkpoints_in
from dtrain.provenance.code import Code


def check_ahead(folder: Path, settings: Settings, ranks: int, code: Code) -> None:
    """Compares a run with what its newest checkpoint says, as the ranks will; nothing is loaded.

    Args:
        folder: the run's, which may not be there.
        settings: the config, bound to the recipe.
        ranks: number of ranks.
        code: the recipe's, as it was loaded here.

    Raises:
        UsageError: it is another run's.
    """
    for path, (_, step) in reversed(checkpoints_in(folder / CHECKPOINTS).items()):
        there = _manifest(path)
        if there is not None:
            plain = settings.plain()
            here = there | {"config": plain, "recipe": {"name": recipe_name(plain["recipe"])}, "data": {}}
            check_facts(there, here, settings)
            check_code(there, code, settings, folder)
            check_ranks(there, step, ranks, settings)
            return
    config = folder / CONFIG
    if config.is_file():
        before = load_settings(str(config), [], environ={})
        differences = differences_before_training(before, settings)
        if differences:
            raise UsageError(
                f"{folder} contains another run without a checkpoint: "
                f"{'; '.join(differences)}. Choose another run.name."
            )


def _manifest(path: Path) -> dict[str, Any] | None:
    """Returns what a checkpoint says of its run, None where the job will find that it is damaged."""
    try:
        found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if {"config", "recipe", "data", "ranks"} <= set(found) else None
