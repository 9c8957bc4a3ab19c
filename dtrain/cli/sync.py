"""`dtrain sync`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import reported


def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; sends nothing.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=1, help="Seconds to wait for the server, per run.")
    ] = 300.0,
) -> None:
    """Send the values of these runs that W&B or MLflow does not have yet. Offline, killed and resumed runs each become
    one run there.

    Example: dtrain sync runs/*
    """
    with reported():
        code = _sync(runs, dry_run, wait)
    raise typer.Exit(code)


def _sync(runs: list[Path], dry_run: bool, wait: float) -> int:
    from dtrain.callbacks.tracking.syncing import sync_run
    from dtrain.errors import EXIT_OK, DtrainError

    worst = EXIT_OK
    for run in runs:
        try:
            found = sync_run(run, wait=wait, dry_run=dry_run)
        except DtrainError as error:
            typer.echo(f"dtrain: error: {error}", err=True)
            worst = max(worst, error.exit_code)
            continue
        for one in found:
            if not one.sent:
                typer.echo(f"{run}: nothing to send ({one})")
            elif dry_run:
                typer.echo(f"{run}: would send whatever {one.to} does not have yet of {one}")
            else:
                typer.echo(f"{run}: sent, {one}: {one.where}")
    return worst
