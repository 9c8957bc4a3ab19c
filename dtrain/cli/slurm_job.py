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
    from dtrain.slurm.attempt import SlurmSignals

_VERB = "slurm-job"
_HANDED_ON = (
    "DTRAIN_RDZV_SECRET",
    "DTRAIN_RDZV_SECRET_FILE",
    "DTRAIN_RUN__NAME",
    "MASTER_PORT",
)  # also where srun exports nothing


def slurm_job(
    words: Annotated[list[str], typer.Argument(metavar=f"{METAVAR} -- srun ...", show_default=False)],
    *,
    requeues: Annotated[int, typer.Option("--requeues", min=0, help="Max requeues without progress.")] = 3,
) -> None:
    """Run a job's ranks with srun, ask them to save and stop before the time limit, and requeue the job.

    It is the last line of a batch script, together with what to train: see slurm/train.sbatch.
    """
    from dtrain.slurm.attempt import SlurmSignals

    with reported(), SlurmSignals().heard() as signals:
        code = _slurm_job(words, requeues, signals)
    raise typer.Exit(code)


def _slurm_job(words: list[str], requeues: int, signals: SlurmSignals) -> int:
    from dtrain.config.recipe_file import title_of
    from dtrain.errors import UsageError
    from dtrain.slurm.attempt import environment_of, named, run_attempt
    from dtrain.slurm.exports import exported
    from dtrain.slurm.own_job import OwnJob

    place = OwnJob.read(os.environ)
    if place is None:
        raise UsageError(
            f"dtrain {_VERB}: not inside a SLURM job (SLURM_JOB_ID is not set). Submit one with `dtrain submit`."
        )
    command = _after_dashes(sys.argv)
    if not command:
        raise UsageError(f"dtrain {_VERB}: the command to run is missing: dtrain {_VERB} CONFIG -- srun ...")
    given = words[: len(words) - len(command)]
    settings = read_target(given)
    config = settings.config
    name = config.run.name or f"{title_of(config.recipe)}-job{place.name}"
    run = Path(config.run.dir).expanduser() / name
    environment = environment_of()
    if config.run.name is None:
        command, variables = named(command, given, run)
        environment |= variables
    command, environment = exported(command, environment, [name for name in _HANDED_ON if name in environment])
    return run_attempt(command, run, place, signals=signals, cap=requeues, environment=environment, say=_say)


def _after_dashes(argv: list[str]) -> list[str]:
    return argv[argv.index("--") + 1 :] if "--" in argv else []


def _say(text: str) -> None:
    print(f"dtrain: {text}", flush=True)  # noqa: T201 - a job's output
