"""`dtrain check parity` and `dtrain check resume`."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.train import METAVAR, read_target
from dtrain.cli.values import TakesValues
from dtrain.wording import counted

if TYPE_CHECKING:
    from dtrain.distributed.world import World

_EPOCHS = 2

app = typer.Typer(
    help="Check on your own recipe what dtrain promises.\n\n"
    "Examples: dtrain check parity digits; dtrain check resume my_recipe.py -n 2",
    no_args_is_help=True,
)


@app.command(cls=TakesValues)
def parity(
    words: Annotated[
        list[str] | None, typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=2, help="Compare this many CPU ranks with one rank.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 5,
    tolerance: Annotated[float, typer.Option(help="Relative tolerance for rounding differences.")] = 1e-4,
) -> None:
    """Compare N CPU ranks with one process: samples, losses, gradients, weights and history.

    Exit code 0 if they are equal, 1 if they differ.

    Example: dtrain check parity digits -n 3
    """
    with reported():
        code = _parity(words or [], ranks, steps, tolerance)
    raise typer.Exit(code)


def _parity(words: list[str], ranks: int, steps: int, tolerance: float) -> int:
    from dtrain.launch.supervisor import dtrain_argv, start_local_ranks

    settings = read_target(words)
    per_rank = settings.config.train.batch == "per_rank"
    with tempfile.TemporaryDirectory(prefix="dtrain-parity-") as folder:
        folders = {1: Path(folder) / "alone", ranks: Path(folder) / "together"}
        for size, out in folders.items():
            out.mkdir()
            merge = ranks if per_rank and size == 1 else 1
            typer.echo(f"{counted(steps, 'step')} on {size} rank{'s' * (size > 1)} ...")
            options = ["check", "trace", "--out", str(out), "--steps", str(steps), "--merge", str(merge)]
            options += ["--like", str(folders[1])] if size > 1 else []
            code = start_local_ranks(dtrain_argv([*options, "-n", str(size), "--", *words]), size)
            if code != 0:
                typer.echo(f"not compared: the run on {size} rank{'s' * (size > 1)} failed, see above.")
                return 1 if size > 1 else code
        return _print(folders[1], folders[ranks], ranks, tolerance)


def _print(alone: Path, together: Path, ranks: int, tolerance: float) -> int:
    from dtrain.tools.check.parity import TracedRun, compare

    one, many = TracedRun.read(alone), TracedRun.read(together)
    parting = compare(one, many, tolerance)
    if parting is None:
        steps = len(one.tensors)
        typer.echo(
            f"equal: {ranks} ranks and 1 took the same samples in {counted(steps, 'optimizer step')}, with equal "
            f"losses, gradients, weights and history (relative tolerance {tolerance:g})."
        )
        return 0
    typer.echo(f"different: {ranks} ranks and 1 first differ at {parting.where}")
    typer.echo(f"  1 rank:   {parting.alone}\n  {ranks} ranks:  {parting.together}\n  likely cause: {parting.cause}")
    return 1


@app.command(cls=TakesValues)
def resume(
    words: Annotated[
        list[str] | None, typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Number of CPU ranks.")] = 1,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps in each of the two epochs.")] = 8,
) -> None:
    """Kill a run at a random step, resume it, and compare it bit by bit with an uninterrupted run.

    Exit code 0 if they are equal, 1 if they differ.

    Example: dtrain check resume digits -n 2
    """
    with reported():
        code = _resume(words or [], ranks, steps)
    raise typer.Exit(code)


def _resume(words: list[str], ranks: int, steps: int) -> int:
    from dtrain.tools.check.resume import compare, read_record

    read_target(words)  # what is wrong with it is told once
    many = f"{ranks} rank{'s' * (ranks > 1)}"
    with tempfile.TemporaryDirectory(prefix="dtrain-resume-") as folder:
        out = Path(folder)
        typer.echo(f"2 epochs of up to {steps} optimizer steps on {many} ...")
        if (code := _rehearsed(words, out, "whole", ranks, steps)) != 0:
            return code
        whole = read_record(out / "whole")
        total = whole[0][-1]["updates"]
        # In the second epoch, since what the first left counts, too; before its last step, which is then compared.
        first = total // 2 + 1
        kill_at = random.SystemRandom().randint(first, max(first, total - 1))
        typer.echo(f"the same, killed after step {kill_at} of {total} ...")
        _rehearsed(words, out, "killed", ranks, steps, kill_at)
        typer.echo("resumed ...")
        if (code := _rehearsed(words, out, "resumed", ranks, steps)) != 0:
            return code
        found = compare(whole, read_record(out / "resumed"))
    if found is None:
        typer.echo(f"equal: samples, losses, weights, optimizer and history, to the last bit, on {many}.")
        return 0
    typer.echo(f"different: the resumed run first differs from the uninterrupted one at {found.where}")
    typer.echo(f"  uninterrupted: {found.whole}\n  resumed:       {found.resumed}\n  likely cause: {found.cause}")
    return 1


def _rehearsed(words: list[str], out: Path, name: str, ranks: int, steps: int, kill_at: int = 0) -> int:  # noqa: PLR0917
    """Runs `rehearse` in a process of its own; its output is shown where it fails without having been asked to."""
    from dtrain.launch.supervisor import dtrain_argv

    (out / name).mkdir()
    options = ["--out", str(out), "--name", name, "--steps", str(steps), "--kill-at", str(kill_at), "-n", str(ranks)]
    argv = [sys.executable, *dtrain_argv(["check", "rehearse", *options, "--", *words])]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0 and kill_at == 0:
        typer.echo(done.stderr, err=True, nl=False)
        typer.echo("not compared: the run failed, see above.")
    return done.returncode


@app.command(hidden=True)
def rehearse(  # noqa: PLR0917 - options
    words: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path, typer.Option()] = Path(),
    name: Annotated[str, typer.Option()] = "",
    steps: Annotated[int, typer.Option()] = 8,
    kill_at: Annotated[int, typer.Option()] = 0,
    ranks: Annotated[int, typer.Option("-n")] = 1,
) -> None:
    """One run for `resume`."""
    from dtrain.cli.ranks import on_ranks

    run = "whole" if name == "whole" else "cut"  # the killed run, and the one that goes on with it
    settings = read_target([*(words or []), f"run.dir={out / 'runs'}", f"run.name={run}", f"epochs={_EPOCHS}"])

    def work(world: World) -> None:
        from dtrain.tools.check.rehearsal import rehearse

        rehearse(settings, world, out / name, steps=steps, kill_at=kill_at)

    with reported():
        code = on_ranks(ranks, True, work)
    raise typer.Exit(code)


@app.command(hidden=True)
def trace(  # noqa: PLR0917 - options
    words: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path, typer.Option()] = Path(),
    steps: Annotated[int, typer.Option()] = 5,
    merge: Annotated[int, typer.Option()] = 1,
    like: Annotated[Path | None, typer.Option()] = None,
    ranks: Annotated[int, typer.Option("-n")] = 1,
) -> None:
    """Record one run for `parity`."""
    with reported():
        _trace(words or [], out, steps, merge, like, ranks)


def _trace(words: list[str], out: Path, steps: int, merge: int, like: Path | None, ranks: int) -> None:  # noqa: PLR0917
    from dtrain.launch.env.rank_env import read_rank_facts
    from dtrain.launch.env.threads import set_threads
    from dtrain.launch.signals.lifeline import end_with_parent

    facts = read_rank_facts()
    settings = read_target(words)
    set_threads(facts.local_size)
    end_with_parent()
    from dtrain.distributed.lazy_dynamo import defer_dynamo
    from dtrain.distributed.world import bring_up
    from dtrain.tools.check.trace import trace_run

    world = bring_up(cpu=True, asked=ranks, facts=facts)
    defer_dynamo()
    trace_run(settings, world, out, steps=steps, merge=merge, like=like)
    world.close()
