"""`dtrain train --from`: the words that a run or a file stands for, whose weights a new run begins with."""

from __future__ import annotations

import json
import os
from pathlib import Path


def from_source(source: str) -> list[str]:
    """Returns the words for the config: the source's own first, then those that a run's own config needs besides.

    A new run has a name of its own. Where it is tried again after a failure, that comes from the environment.
    """
    name = os.environ.get("DTRAIN_RUN__NAME")
    words: dict[str, object] = {
        "train.init_from": str(Path(source).expanduser()),
        "run.name": name,
        "train.init_partial": False,
        "train.init_rename": {},
    }
    return [f"{key}={json.dumps(value)}" for key, value in words.items()]


def run_of(source: str) -> Path | None:
    """Returns the folder of the run that a source is, or whose checkpoint it is; None of a file."""
    from dtrain.layout import CHECKPOINTS, CONFIG

    path = Path(source).expanduser().absolute()
    above = path.parent.parent if path.parent.name == CHECKPOINTS else path
    return next((folder for folder in (path, above) if (folder / CONFIG).is_file()), None)
