"""`dtrain export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.evaluate import Run, Saved, Words
from dtrain.cli.guard import piped, reported

if TYPE_CHECKING:
    from dtrain.distributed.world import World


def export(
    run: Run,
    words: Words = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="FILE.safetensors, .pt2 or .onnx; default: by the run's name."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="safetensors, pt2 (torch.export) or onnx; default: by FILE."),
    ] = None,
    checkpoint: Saved = "best",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0.0, help="Largest difference allowed, relative to the largest output."),
    ] = 1e-4,
) -> None:
    """Export a run's model to a file, and compare its outputs with the model's on a validation batch.

    safetensors holds the weights; pt2 and onnx run without the recipe, on batches
    of any size. The weights are those of the best epoch, averaged ones if the run
    has an average. Computed on the CPU.

    Examples: dtrain export runs/digits-1; dtrain export runs/digits-1 -o digits.onnx --checkpoint last
    """
    with reported():
        from dtrain.cli.ranks import on_ranks
        from dtrain.config.saved import load_run_settings
        from dtrain.errors import UsageError
        from dtrain.launch.env.rank_env import read_rank_facts

        if read_rank_facts().size > 1:
            raise UsageError("dtrain export runs in one process. Start it without a launcher: dtrain export RUN")
        if form is None and out is None:
            form = "safetensors"
        from dtrain.tools.export.checked import check_place
        from dtrain.tools.export.formats import format_of
        from dtrain.tools.export.of_run import RECOMPUTED, export_run

        kind = format_of(form, out)
        file = Path(run.resolve().name + kind.ending) if out is None else out.expanduser()
        check_place(file, force=force)
        settings = load_run_settings(run, [*(words or []), RECOMPUTED])

        def work(world: World) -> None:
            made, restored = export_run(
                run, settings, checkpoint, world, file=file, kind=kind, force=force, tolerance=tolerance
            )
            with piped():
                typer.echo(f"max abs difference: {made.difference:.3g}, {_compared(made.sizes)}")
                typer.echo(f"{restored.where} of {run}: {made.file} ({made.bytes:,} bytes)")

        code = on_ranks(None, True, work, to_read=True)
    raise typer.Exit(code)


def _compared(sizes: tuple[int, ...]) -> str:
    """What was compared, in words."""
    if not sizes:
        return "of the weights (the recipe does not say how to call the model)"
    *others, last = map(str, sizes)
    return f"of the outputs for {', '.join(others)}{' and ' * bool(others)}{last} samples"
