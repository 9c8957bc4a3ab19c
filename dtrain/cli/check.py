"""`dtrain check parity`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.train import METAVAR, read_target

app = typer.Typer(help="Prove, on your own recipe, what dtrain promises.", no_args_is_help=True)


@app.command()
def parity(
    words: Annotated[list[str] | None, typer.Argument(metavar=METAVAR, show_default=False)] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=2, help="Compare this many CPU ranks with one.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 5,
    tolerance: Annotated[float, typer.Option(help="Relative difference that rounding may make.")] = 1e-4,
) -> None:
    """Compare N CPU ranks with one process: samples, losses, gradients, weights, history.

    Exit code 0 where they are equal, 1 where they part.

    Example: dtrain check parity digits model.dropout=0 -n 3
    """
    with reported():
        code = _parity(words or [], ranks, steps, tolerance)
    raise typer.Exit(code)


def _parity(words: list[str], ranks: int, steps: int, tolerance: float) -> int:
    from dtrain.launch.local import dtrain_argv, start_local_ranks

    settings = read_target(words)
    per_rank = settings.config.train.batch == "per_rank"
    with tempfile.TemporaryDirectory(prefix="dtrain-parity-") as folder:
        folders = {1: Path(folder) / "alone", ranks: Path(folder) / "together"}
        for size, out in folders.items():
            out.mkdir()
            merge = ranks if per_rank and size == 1 else 1
            typer.echo(f"{steps} steps on {size} rank{'s' * (size > 1)} ...")
            options = ["check", "trace", "--out", str(out), "--steps", str(steps), "--merge", str(merge)]
            code = start_local_ranks(dtrain_argv([*options, "-n", str(size), "--", *words]), size)
            if code != 0:
                typer.echo(f"no comparison: the run on {size} rank{'s' * (size > 1)} failed, see above.")
                return 1 if size > 1 else code
        return _tell(folders[1], folders[ranks], ranks, settings.config.train.accumulation, tolerance)


def _tell(alone: Path, together: Path, ranks: int, accumulation: int, tolerance: float) -> int:
    from dtrain.check.parity import Record, compare

    one, many = Record.read(alone), Record.read(together)
    parting = compare(one, many, accumulation, tolerance)
    if parting is None:
        steps = len(one.tensors)
        typer.echo(
            f"equal: {ranks} ranks and 1 took the same samples in {steps} optimizer steps, with equal losses, "
            f"gradients, weights and history (relative tolerance {tolerance:g})."
        )
        return 0
    typer.echo(f"different: {ranks} ranks part from 1 at {parting.where}")
    typer.echo(f"  1 rank:   {parting.alone}\n  {ranks} ranks:  {parting.together}\n  likely cause: {parting.cause}")
    return 1


@app.command(hidden=True)
def trace(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path, typer.Option()] = Path(),
    steps: Annotated[int, typer.Option()] = 5,
    merge: Annotated[int, typer.Option()] = 1,
    ranks: Annotated[int, typer.Option("-n")] = 1,
) -> None:
    """Record one run for `parity`."""
    with reported():
        _trace(words or [], out, steps, merge, ranks)


def _trace(words: list[str], out: Path, steps: int, merge: int, ranks: int) -> None:
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.lifeline import hold_on
    from dtrain.launch.threads import set_threads

    facts = read_rank_facts()
    settings = read_target(words)
    set_threads(facts.local_size)
    hold_on()
    from dtrain.check.trace import trace_run
    from dtrain.world import bring_up

    world = bring_up(cpu=True, asked=ranks, facts=facts)
    trace_run(settings, world, out, steps=steps, merge=merge)
    world.close()
