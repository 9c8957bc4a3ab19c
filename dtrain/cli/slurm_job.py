"""`dtrain slurm-job`: what a batch script runs on its first node."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.train import METAVAR, read_target

if TYPE_CHECKING:
    from dtrain.slurm.incarnation import Signals

_VERB = "slurm-job"


def slurm_job(
    words: Annotated[list[str], typer.Argument(metavar=f"{METAVAR} -- srun ...", show_default=False)],
    *,
    requeues: Annotated[
        int, typer.Option("--requeues", min=0, help="So many starts without progress are followed by another one.")
    ] = 3,
) -> None:
    """Run a job's ranks by srun, ask them to stop ahead of the time limit, and have SLURM start the job again.

    It belongs into a batch script, as its last line, with what the ranks train: slurm/train.sbatch is an example.
    """
    from dtrain.slurm.incarnation import Signals

    with reported(), Signals().heard() as signals:
        code = _slurm_job(words, requeues, signals)
    raise typer.Exit(code)


def _slurm_job(words: list[str], requeues: int, signals: Signals) -> int:
    from dtrain.errors import UsageError
    from dtrain.recipe_file import title_of
    from dtrain.slurm.incarnation import environment_of, run_incarnation
    from dtrain.slurm.own_job import Place

    place = Place.read(os.environ)
    if place is None:
        raise UsageError(f"dtrain {_VERB}: this is no job of SLURM's (SLURM_JOB_ID). `dtrain submit` makes one.")
    command = _after_dashes(sys.argv)
    if not command:
        raise UsageError(f"dtrain {_VERB}: what shall run is missing: dtrain {_VERB} CONFIG -- srun ...")
    settings = read_target(words[: len(words) - len(command)])
    config = settings.config
    name = config.run.name or f"{title_of(config.recipe)}-job{place.name}"
    run = Path(config.run.dir).expanduser() / name
    environment = environment_of(run, named=config.run.name is not None)
    return run_incarnation(command, run, place, signals=signals, cap=requeues, environment=environment, say=_say)


def _after_dashes(argv: list[str]) -> list[str]:
    return argv[argv.index("--") + 1 :] if "--" in argv else []


def _say(text: str) -> None:
    print(f"dtrain: {text}", flush=True)  # noqa: T201 - a job's output
