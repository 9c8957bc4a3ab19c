"""`dtrain jobs`, `dtrain cancel` and `dtrain requeue`: what becomes of runs that were submitted to SLURM."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import piped, reported

if TYPE_CHECKING:
    from dtrain.slurm.runs import KnownJobs, RunJob

_RECENT_SECONDS = 24 * 3600.0

Names = Annotated[list[str], typer.Argument(metavar="JOB|RUN ...", help="123, 123_4, a run's name, or its folder.")]
Runs = Annotated[
    Path, typer.Option("--dir", metavar="RUNS", envvar="DTRAIN_RUN__DIR", help="Folder of runs (run.dir).")
]


def jobs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB|RUN ...]", help="Only these.", show_default=False)
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Include jobs that ended more than a day ago.")] = False,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show runs submitted to SLURM: state, epochs, latest metrics, time left, requeues, and why they are pending.

    States in capitals are SLURM's; once SLURM has forgotten a job, its state is
    read from the run's folder. REQUEUED counts the starts after the first one
    and, in brackets, those without progress: no new row of the history and no
    checkpoint.

    Examples: dtrain jobs; dtrain jobs digits-lr 123_4; dtrain jobs --all --json
    """
    with reported(), piped():
        from dtrain.cli import jobs_table as table

        known = look_for(names or [], runs, needed_for="dtrain jobs")
        wanted = found(names, known) if names else [one for one in known.all if everything or _is_recent(one)]
        rows = [table.row_of(one) for one in wanted]
        if as_json:
            typer.echo(table.as_json(rows))
        elif rows and sys.stdout.isatty():
            import shutil

            typer.echo(table.as_table(rows, shutil.get_terminal_size().columns))
        elif rows:
            typer.echo(table.as_text(rows))
        for words in (*known.troubles, *_about(len(rows), len(known.all), bool(names), known)):
            typer.echo(f"dtrain: {words}", err=True)


def cancel(
    names: Names,
    *,
    now: Annotated[bool, typer.Option("--now", help="Cancel at once, without saving a checkpoint.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Cancel jobs: running ones save a checkpoint first, pending ones leave the queue.

    An array's number means all of its tasks. `dtrain requeue` resumes a run
    later.

    Examples: dtrain cancel 123; dtrain cancel digits-lr 123_4 --now
    """
    with reported():
        from dtrain.slurm import orders

        known = look_for(names, runs, needed_for="dtrain cancel")
        _check_answered(known)
        orders.cancel(found(names, known), typer.echo, now=now)


def requeue(names: Names, *, runs: Runs = Path("runs")) -> None:
    """Restart runs from their last checkpoint; running ones save first.

    If SLURM no longer knows the job, the same script is submitted again.

    Examples: dtrain requeue 123; dtrain requeue digits-lr 123_4
    """
    with reported():
        from dtrain.report.progress import read_progress
        from dtrain.slurm import orders

        known = look_for(names, runs, needed_for="dtrain requeue")
        _check_answered(known)
        for one in found(names, known):
            orders.requeue(one, typer.echo, complete=one.run is not None and read_progress(one.run).complete)


def look_for(names: Sequence[str], runs: Path, *, needed_for: str) -> KnownJobs:
    """Asks SLURM, and the runs' folders, those among the names included."""
    from dtrain.slurm.runs import look

    return look(runs, [Path(name) for name in names if "/" in name], needed_for=needed_for)


def found(names: Sequence[str], known: KnownJobs) -> list[RunJob]:
    """Returns what people mean by names, each once.

    Raises:
        UsageError: there is nothing of a name.
    """
    from dtrain.slurm.runs import find

    return list(dict.fromkeys(one for name in names for one in find(name, known)))


def _check_answered(known: KnownJobs) -> None:
    """Whether SLURM answered; what runs is not to be taken for over.

    Raises:
        SlurmError: it did not.
    """
    from dtrain.errors import SlurmError

    if known.queue.trouble:
        raise SlurmError(f"{known.queue.trouble}. Nothing was changed.")


def _is_recent(one: RunJob) -> bool:
    if not one.is_over:
        return True
    record = one.record
    last = record.incarnations[-1].started if record is not None and record.incarnations else None
    when = one.ended or last or (record.submitted if record is not None else None) or 0.0
    return time.time() - when < _RECENT_SECONDS


def _about(shown: int, there: int, named: bool, known: KnownJobs) -> list[str]:
    told = []
    if known.queue.trouble:
        told.append("the states are the last ones recorded in the runs' folders")
    if not there:
        told.append(f"no run in {known.runs} was submitted as a job (set another folder with --dir)")
    elif shown < there and not named:
        told.append(f"{there - shown} that ended more than a day ago: show with --all")
    return told
