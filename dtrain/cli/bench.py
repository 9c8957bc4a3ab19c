"""`dtrain bench`."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.ranks import on_ranks
from dtrain.cli.train import METAVAR, read_target
from dtrain.wording import counted

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.tools.bench.advice import BenchResult

_STARTS = 4  # of ranks that end in trials, after which nothing more is tried


def bench(  # noqa: PLR0917 - options
    words: Annotated[
        list[str] | None, typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Compare one rank with this many ranks.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Train steps to time.")] = 50,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    trials: Annotated[
        bool, typer.Option(help="Also try what could be faster, for at most as long as measuring took.")
    ] = True,
    compile: Annotated[bool, typer.Option("--compile", help="Also try train.compile, which may take minutes.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file (JSON).")] = None,
) -> None:
    """Measure where the time of a train step goes, and try what would make it faster. Writes nothing.

    Each change is tried by itself, by turns with the run as it is; gains beyond the noise are listed.

    Example: dtrain bench my_recipe.py data.batch_size=64 -n 2
    """
    with reported():
        options = [*["--cpu"] * cpu, *["--compile"] * compile, "--steps", str(steps), "--began", str(time.time())]
        code = _bench(words or [], ranks, options, out, trials=trials)
    raise typer.Exit(code)


def _bench(words: list[str], ranks: int, options: list[str], out: Path | None, *, trials: bool) -> int:
    read_target(words)
    found: dict[int, BenchResult] = {}
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        for size in sorted({1, ranks}):
            file = Path(folder) / f"{size}.json"
            tries = ["--trials" if trials and size == ranks else "--no-trials"]
            code = _measure(file, size, ["bench-rank", "--out", str(file), *options, *tries], words)
            if code != 0:
                return code
            found[size] = _read(file)
            if size > 1:
                typer.echo(_scaling(found[1], found[size], size))
            _print_found(found[size], size, trials=trials and size == ranks)
    if out is not None:
        out.write_text(json.dumps({size: vars(one) for size, one in found.items()}, indent=2), encoding="utf-8")
    return 0


def _measure(file: Path, size: int, options: list[str], words: list[str]) -> int:
    """Has ranks measure; where they end in a trial, others go on with the next one. Returns the exit code."""
    from dtrain.launch.supervisor import dtrain_argv, run_local_ranks, told
    from dtrain.tools.bench.notes import skip_trial

    for start in range(1, _STARTS + 1):
        ending = run_local_ranks(dtrain_argv([*options, "-n", str(size), "--", *words]), size)
        if ending.exit_code == 0 or not skip_trial(file, ending.exit_code, last=start == _STARTS):
            return told(ending)
    return 0


def _read(file: Path) -> BenchResult:
    from dtrain.tools.bench.advice import BenchResult
    from dtrain.tools.bench.notes import read_notes

    return BenchResult(**read_notes(file)["result"])


def _print_found(measured: BenchResult, ranks: int, *, trials: bool) -> None:
    from dtrain.tools.bench.advice import advice, trial_words

    lines = trial_words(measured) if trials else []
    if ranks == 1:
        lines += [f"advice: {text}" for text in advice(measured)]
    for line in lines:
        typer.echo(line)


def _print_measured(measured: BenchResult, ranks: int) -> None:
    """On rank 0, before anything is tried."""
    from dtrain.tools.bench.advice import compute_words, shares_of

    lines = [_head(measured, ranks)]
    for name, share in shares_of(measured).items() if ranks == 1 else ():
        lines.append(f"  {name:<22}{1e3 * measured.parts[name]:9.3f} ms {100 * share:4.0f} %")
    with piped():
        typer.echo("\n".join([*lines, *compute_words(measured)]))


def _print_trying(names: list[str], seconds: float) -> None:
    if "compile=true" in names:
        names = [*names[:-1], "then, for as long as it takes, compile=true"]
    with piped():
        typer.echo(f"trying for at most {seconds:.0f} s, each by itself: {', '.join(names)}")


def _scaling(one: BenchResult, many: BenchResult, ranks: int) -> str:
    times = many.samples_per_second / one.samples_per_second
    return f"{ranks} ranks: {times:.2f} times the samples/s of 1 rank, {100 * times / ranks:.0f} % of {ranks} times"


def _head(measured: BenchResult, ranks: int) -> str:
    return (
        f"{ranks} rank{'s' * (ranks > 1)} on {measured.device}, {counted(measured.steps, 'step')}: "
        f"{1e3 * measured.step_seconds:.3f} ms a step, {measured.samples_per_second:,.0f} samples/s"
    )


def bench_rank(  # noqa: PLR0917 - options
    words: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path, typer.Option()] = Path(),
    steps: Annotated[int, typer.Option()] = 50,
    cpu: Annotated[bool, typer.Option()] = False,
    ranks: Annotated[int, typer.Option("-n")] = 1,
    trials: Annotated[bool, typer.Option()] = True,
    compile: Annotated[bool, typer.Option()] = False,
    began: Annotated[float, typer.Option()] = 0.0,
) -> None:
    """Measure on one rank, for `bench`."""

    def work(world: World) -> None:
        from dtrain.tools.bench.measure import Asked, Tell, bench

        tell = Tell(lambda measured: _print_measured(measured, world.size), _print_trying)
        asked = Asked(steps, trials=trials, compile=compile, began=began or time.time())
        bench(read_target(words or []), world, asked, out, tell)

    with reported():
        on_ranks(ranks, cpu, work)
