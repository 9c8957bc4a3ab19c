"""`dtrain clean`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.history import RunNames, RunsDir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.tools.clean import Item


def clean(
    names: RunNames = None,
    *,
    keep_last: Annotated[
        int | None,
        typer.Option("--keep-last", min=1, metavar="N", help="Also delete checkpoints; the last N of each run stay."),
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option("--keep-best", min=1, metavar="N", help="Also delete checkpoints; the best N of each run stay."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only list what would be deleted.")] = False,
    runs: RunsDir = Path("runs"),
) -> None:
    """List what can be deleted: runs that ended before their first epoch, with nothing to resume.

    With --keep-last or --keep-best also checkpoints; the last and the best one of a
    run always stay. Runs in use, links and other programs' files are left alone.

    Examples: dtrain clean; dtrain clean --yes; dtrain clean digits-lr --keep-last 1 --keep-best 1 --yes
    """
    with reported(), piped():
        from dtrain.report.finding import find_runs
        from dtrain.tools.clean import Rule, delete, find

        wanted = keep_last is not None or keep_best is not None
        rule = Rule(keep_last or 1, keep_best or 1) if wanted else None
        found = find(find_runs(names or [], runs), runs, rule)
        left = list(found.skipped)
        gone: list[Item] = []
        for item in found.items:
            reason = delete(item, rule) if yes else ""
            if reason:
                left.append(f"{item.path}: {reason}")
            else:
                gone.append(item)
                typer.echo(f"{item.path}  {item.bytes:,} bytes  {item.why}")
        for line in left:
            typer.echo(f"skipped {line}")
        typer.echo(_total(gone, runs, deleted=yes))
        failed = yes and len(gone) < len(found.items)
    raise typer.Exit(int(failed))


def _total(items: Sequence[Item], runs: Path, *, deleted: bool) -> str:
    if not items:
        return f"nothing to delete in {runs}" if not deleted else f"nothing was deleted in {runs}"
    counts = {"run": sum(one.is_run for one in items), "checkpoint": sum(not one.is_run for one in items)}
    words = " and ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n)
    total = f"{words}, {sum(one.bytes for one in items):,} bytes"
    return f"deleted {total}" if deleted else f"{total} would be deleted; delete with --yes"
