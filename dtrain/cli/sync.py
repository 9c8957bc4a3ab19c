"""`dtrain sync`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import reported


def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=1, help="How long to wait for the server, for each run.")
    ] = 300.0,
) -> None:
    """Send to W&B what of these runs is not there yet: offline, killed and resumed ones, each into one run.

    Example: dtrain sync runs/*
    """
    with reported():
        code = _sync(runs, dry_run, wait)
    raise typer.Exit(code)


def _sync(runs: list[Path], dry_run: bool, wait: float) -> int:
    from dtrain.errors import EXIT_OK, DtrainError
    from dtrain.tracking.syncing import sync_run

    worst = EXIT_OK
    for run in runs:
        try:
            found = sync_run(run, wait=wait, dry_run=dry_run)
        except DtrainError as error:
            typer.echo(f"dtrain: error: {error}", err=True)
            worst = max(worst, error.exit_code)
            continue
        if not found.sent:
            typer.echo(f"{run}: nothing to send ({found})")
        elif dry_run:
            typer.echo(f"{run}: would send what W&B does not have of {found}")
        else:
            typer.echo(f"{run}: sent, {found}: {found.where}")
    return worst
