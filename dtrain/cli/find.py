"""`dtrain find lr` and `dtrain find batch`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.find_batch import batch, try_batch
from dtrain.cli.guard import piped, reported
from dtrain.cli.ranks import on_ranks
from dtrain.cli.train import METAVAR, claims_of, read_target
from dtrain.cli.values import TakesValues
from dtrain.wording import number

if TYPE_CHECKING:
    from dtrain.config import Settings
    from dtrain.distributed.world import World
    from dtrain.errors import DtrainError
    from dtrain.tools.find.curve import Curve, Suggestion
    from dtrain.tools.find.lr import RangeTestResult

app = typer.Typer(
    help="Find a learning rate, or the largest batch that fits. Writes nothing.\n\n"
    "Examples: dtrain find lr my_recipe.py; dtrain find batch my_recipe.py",
    no_args_is_help=True,
)
app.command(cls=TakesValues)(batch)
app.command(name="try-batch", hidden=True)(try_batch)
_TOLD = 10  # lines while it runs
_FEW = 30  # steps whose losses, of a batch each, scatter too much for the curve's place to be told


@app.command(cls=TakesValues)
def lr(
    words: Annotated[
        list[str] | None, typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False)
    ] = None,
    *,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=1, help="Number of ranks to start on this machine.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    start: Annotated[float, typer.Option("--from", help="Learning rate to start at.")] = 1e-7,
    end: Annotated[float, typer.Option("--to", help="Learning rate to end at.")] = 10.0,
    steps: Annotated[int, typer.Option("--steps", min=10, help="Optimizer steps between the two.")] = 100,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.png|svg|pdf", help="Save the plot to this file.")
    ] = None,
) -> None:
    """Find a learning rate: raise it at each optimizer step and see where the loss falls. Writes nothing.

    If the loss is too noisy, the test is repeated with 4 and 16 times the steps.

    Exit code 1 if the loss does not fall.

    Examples: dtrain find lr; dtrain find lr my_recipe.py -n 2 --cpu --steps 200 -o lr.png
    """
    with reported():
        from dtrain.tools.find.curve import growing

        if out is not None:
            from dtrain.cli.plot import check_kind

            check_kind(out)
        rates = growing(start, end, steps)
        settings = read_target(words or [])

        def work(world: World) -> None:
            from dtrain.tools.find.lr import find_clear_lr

            tells = (_print, _print_rerun) if world.is_main else (None, None)
            found = find_clear_lr(settings, world, rates, *tells)
            if world.is_main:
                with piped():
                    _show(found, settings, out)
            world.gather_json(None)  # none fails, and has the others ended, before that is shown
            suggestion = found.curve.suggestion()
            if suggestion is None or not suggestion.agree:
                raise _no_suggestion(found.curve, suggestion)
            if world.is_main:
                options = [*(["-n", str(ranks)] if ranks else []), *["--cpu"] * cpu]
                with piped():
                    _print_next(found, suggestion, settings, words or [], options)

        code = on_ranks(ranks, cpu, work, claims=lambda: claims_of(settings))
    raise typer.Exit(code)


def _print(curve: Curve) -> None:
    done, steps = len(curve.losses), len(curve.rates)
    if done % max(1, steps // _TOLD) == 0 and not curve.ended:
        with piped():
            typer.echo(f"[step = {done}/{steps}] lr: {curve.rates[done - 1]:.2g}, loss: {number(curve.smoothed[-1])}")


def _print_rerun(curve: Curve) -> None:
    from dtrain.tools.find.lr import MORE

    done, steps = len(curve.losses), len(curve.rates)
    typer.echo(
        f"after {done} of {steps} steps: the loss is too noisy to see where it falls; repeating with "
        f"{MORE * steps} steps"
    )


def _show(found: RangeTestResult, settings: Settings, out: Path | None) -> None:
    """The curve here, and as a picture where one is wanted."""
    import math

    from dtrain.cli.plot import print_panels
    from dtrain.config.recipe_file import title_of
    from dtrain.report.curves import Line, Panel
    from dtrain.report.runs import Run

    curve = found.curve
    if curve.ended:
        typer.echo(f"stopped after {len(curve.losses)} of {len(curve.rates)} steps: {curve.ended}")
    rates, _, smoothed = curve.points()
    if not rates:
        return
    run, top = Run(title_of(settings.config.recipe), Path()), curve.top()
    shown = [(math.log10(rate), loss) for rate, loss in zip(rates, smoothed, strict=True) if loss <= top]
    xs, ys = zip(*shown, strict=True)
    line = Line(run, 0, "loss", False, xs, ys, None, ())
    print_panels([Panel("smoothed training loss", (line,))], x="log10 of the lr", log=False, most=None)
    if out is not None:
        from dtrain.cli.plot import kind_of
        from dtrain.report.files import write_bytes
        from dtrain.tools.find.picture import picture

        write_bytes(out.expanduser(), picture(curve, curve.suggestion(), kind=kind_of(out)))
        typer.echo(f"plot: {out}")


def _no_suggestion(curve: Curve, suggestion: Suggestion | None) -> DtrainError:
    from dtrain.errors import DtrainError

    steps = len(curve.rates)
    if suggestion is not None:
        why = (
            f"the smoothed loss falls most steeply at {suggestion.steepest:.2g}, and is lowest at "
            f"{suggestion.lowest:.2g}, which contradict each other"
        )
    else:
        bounds = f"between lr {curve.rates[0]:.2g} and {curve.rates[len(curve.losses) - 1]:.2g}"
        scatters = f", or by less than its noise in {steps} steps" if curve.unclear else ""
        why = f"the loss does not fall {bounds}{scatters}"
    return DtrainError(
        f"no lr is suggested: {why}. Try other bounds (--from, --to), more steps (--steps {4 * steps}) or larger "
        "batches; dtrain train ... overfit_batches=1 shows whether the model can learn at all.",
        on_all_ranks=True,
    )


def _print_next(
    found: RangeTestResult, suggestion: Suggestion, settings: Settings, words: list[str], options: list[str]
) -> None:
    typer.echo(f"lr = {suggestion.steepest:.2g}: where the smoothed loss falls most steeply")
    typer.echo(
        f"lr = {suggestion.tenth:.2g}: a tenth of the lr at which it is lowest ({suggestion.lowest:.2g}, "
        f"loss {number(suggestion.loss)})"
    )
    if found.several:
        times = ", ".join(f"{ratio:g}" for ratio in found.several)
        typer.echo(f"the parameter groups kept their ratios: their lr was {times} times this one")
    if found.others:
        rest = "; ".join(f"{name}: {', '.join(f'{r:g}' for r in ratios)}" for name, ratios in found.others.items())
        typer.echo(f"this is the lr of {found.of}; the other optimizers kept their ratios to it: {rest}")
    if (steps := len(found.curve.rates)) < _FEW:
        typer.echo(f"note: with {steps} steps this may be chance; use --steps 100 (the default) or more", err=True)
    if found.key is None:
        typer.echo(f"next: set it where {settings.config.recipe} creates the optimizer: no builder has a parameter lr")
        return
    kept = [word for word in words if word.partition("=")[0] not in (found.key, f"optimizer.{found.key}")]
    typer.echo(f"next: {shlex.join(['dtrain', 'train', *kept, f'{found.key}={suggestion.careful:.2g}', *options])}")
