"""`dtrain logs`: what a job, or one of its ranks, has written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.jobs import Runs, found, look_for

if TYPE_CHECKING:
    from dtrain.slurm.runs import RunJob


def logs(
    name: Annotated[str, typer.Argument(metavar="JOB|RUN", help="123, 123_4, a run's name, or its folder.")],
    *,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Show only this rank's output.", show_default=False)
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow the output until the job ends.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Show a job's output, over all its requeues, and why it failed.

    For an array, name one task: 123_4.

    Examples: dtrain logs 123; dtrain logs digits-lr -f; dtrain logs 123_4 --rank 1
    """
    with reported():
        from dtrain.errors import EXIT_INTERRUPTED

        known = look_for([name], runs, needed_for="dtrain logs")
        one = _only(name, found([name], known))
        try:
            _show(one, _file(one, name, rank), follow)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except KeyboardInterrupt:  # the usual end of -f
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _only(name: str, jobs: list[RunJob]) -> RunJob:
    from dtrain.errors import UsageError

    if len(jobs) == 1:
        return jobs[0]
    tasks = ", ".join(f"{one.id} ({one.name})" for one in jobs[:10])
    raise UsageError(f"{name}: is an array of {len(jobs)} tasks. Name one task: {tasks}.")


def _file(one: RunJob, name: str, rank: int | None) -> Path:
    from dtrain.slurm.output import output_of, rank_log

    return output_of(one, name) if rank is None else rank_log(one, rank)


def _show(one: RunJob, path: Path, follow: bool) -> None:
    from dtrain.slurm import following
    from dtrain.slurm.failed import failure_of

    tail = following.Tail(path)
    if follow and not one.is_over:
        one = following.follow(tail, one, _write, _print)
    elif not tail.rest(_write):
        _print(following.waiting_words(one) or f"{one.words}: no output yet in {path}")
    if report := failure_of(one):
        typer.echo(report, err=True)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _print(words: str) -> None:
    if words:
        typer.echo(f"dtrain: {words}", err=True)
