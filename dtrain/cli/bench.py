"""`dtrain bench`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.ranks import on_ranks
from dtrain.cli.train import METAVAR, read_target
from dtrain.wording import counted

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.tools.bench.advice import BenchResult


def bench(
    words: Annotated[
        list[str] | None, typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Compare one rank with this many ranks.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Train steps to time.")] = 50,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file (JSON).")] = None,
) -> None:
    """Measure where the time of a train step goes, and suggest what would make it faster. Writes nothing.

    Example: dtrain bench my_recipe.py data.batch_size=64 -n 2
    """
    with reported():
        code = _bench(words or [], ranks, steps, cpu, out)
    raise typer.Exit(code)


def _bench(words: list[str], ranks: int, steps: int, cpu: bool, out: Path | None) -> int:
    from dtrain.launch.supervisor import dtrain_argv, start_local_ranks

    read_target(words)
    found: dict[int, BenchResult] = {}
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        for size in sorted({1, ranks}):
            file = Path(folder) / f"{size}.json"
            options = ["bench-rank", "--out", str(file), "--steps", str(steps), *["--cpu"] * cpu]
            code = start_local_ranks(dtrain_argv([*options, "-n", str(size), "--", *words]), size)
            if code != 0:
                return code
            found[size] = _read(file)
            typer.echo(_table(found[size], size) if size == 1 else _scaling(found[1], found[size], size))
    if out is not None:
        out.write_text(json.dumps({size: vars(one) for size, one in found.items()}, indent=2), encoding="utf-8")
    return 0


def _read(file: Path) -> BenchResult:
    from dtrain.tools.bench.advice import BenchResult

    return BenchResult(**json.loads(file.read_text(encoding="utf-8")))


def _table(measured: BenchResult, ranks: int) -> str:
    from dtrain.tools.bench.advice import advice, shares_of

    lines = [_head(measured, ranks)]
    for name, share in shares_of(measured).items():
        lines.append(f"  {name:<22}{1e3 * measured.parts[name]:9.3f} ms {100 * share:4.0f} %")
    return "\n".join([*lines, *(f"advice: {text}" for text in advice(measured))])


def _scaling(one: BenchResult, many: BenchResult, ranks: int) -> str:
    times = many.samples_per_second / one.samples_per_second
    return (
        f"{_head(many, ranks)}: {times:.2f} times the samples/s of 1 rank, {100 * times / ranks:.0f} % of {ranks} times"
    )


def _head(measured: BenchResult, ranks: int) -> str:
    return (
        f"{ranks} rank{'s' * (ranks > 1)} on {measured.device}, {counted(measured.steps, 'step')}: "
        f"{1e3 * measured.step_seconds:.3f} ms a step, {measured.samples_per_second:,.0f} samples/s"
    )


def bench_rank(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path, typer.Option()] = Path(),
    steps: Annotated[int, typer.Option()] = 50,
    cpu: Annotated[bool, typer.Option()] = False,
    ranks: Annotated[int, typer.Option("-n")] = 1,
) -> None:
    """Measure on one rank, for `bench`."""

    def work(world: World) -> None:
        from dtrain.tools.bench.measure import measure

        measured = measure(read_target(words or []), world, steps)
        if world.is_main:
            out.write_text(json.dumps(measured), encoding="utf-8")

    with reported():
        on_ranks(ranks, cpu, work)
