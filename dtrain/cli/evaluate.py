"""`dtrain evaluate`, `dtrain predict` and `dtrain summary`."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.ranks import on_ranks
from dtrain.wording import counted

if TYPE_CHECKING:
    from dtrain.distributed.world import World


class Data(str, Enum):
    """Which of a recipe's data sets."""

    valid = "valid"
    train = "train"


def by_name(run: Path) -> Path:
    """Returns a run's folder: as it was named, or the one of this name in the folder of runs."""
    inside = Path(os.environ.get("DTRAIN_RUN__DIR", "runs")) / run
    return inside if not run.exists() and inside.is_dir() else run


Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        callback=by_name,
        help="A run's folder, as `dtrain train` printed it, or its name under run.dir.",
    ),
]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Override values of the run's config.")
]
Saved = Annotated[
    str,
    typer.Option(
        "--checkpoint", metavar="best|last|NAME", help="Weights of the best or last epoch, or of a checkpoint by name."
    ),
]
Ranks = Annotated[int | None, typer.Option("-n", "--ranks", min=1, help="Number of ranks to start on this machine.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")]


def evaluate(run: Run, words: Words = None, checkpoint: Saved = "best", ranks: Ranks = None, cpu: Cpu = False) -> None:
    """Evaluate a run's saved weights on its validation data.

    Examples: dtrain evaluate runs/digits-1; dtrain evaluate runs/digits-1 valid_samples=100 -n 2 --cpu
    """
    with reported():
        from dtrain.config.saved import load_run_settings

        settings = load_run_settings(run, words or [])

        def work(world: World) -> None:
            from dtrain.trainer.evaluate import evaluate_run, restore_run

            restored = restore_run(run, settings, checkpoint, world)
            result = evaluate_run(restored, world)
            if world.is_main:
                with piped():
                    typer.echo(f"{restored.where} of {run}, {counted(result.samples, 'sample')}")
                    for name, mean in result.means.items():
                        typer.echo(f"val_{name} = {mean!r}")

        code = on_ranks(ranks, cpu, work, to_read=True, hang_seconds=settings.config.train.hang_seconds)
    raise typer.Exit(code)


def predict(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="FILE.csv, .npy, .parquet or .jsonl")],
    *,
    words: Words = None,
    checkpoint: Saved = "best",
    data: Annotated[Data, typer.Option("--data", help="Which of the recipe's datasets to predict.")] = Data.valid,
    loader: Annotated[
        str | None,
        typer.Option("--loader", metavar="NAME", help="Which of several validation loaders; default: the first."),
    ] = None,
    ranks: Ranks = None,
    cpu: Cpu = False,
) -> None:
    """Write a run's predictions to a file, in dataset order, one row per sample.

    Where the recipe has build_classes(), a row is the label and the probabilities.

    Examples: dtrain predict runs/digits-1 -o digits.csv; dtrain predict runs/digits-1 -o digits.npy -n 2 --cpu
    """
    with reported():
        from dtrain.config.saved import load_run_settings
        from dtrain.trainer.export import check_target

        check_target(out)
        settings = load_run_settings(run, words or [])

        def work(world: World) -> None:
            from dtrain.trainer.agreed import agree
            from dtrain.trainer.classes import with_labels
            from dtrain.trainer.evaluate import chosen_loader, predict_run, restore_run
            from dtrain.trainer.export import write_predictions

            restored = restore_run(run, settings, checkpoint, world)
            name, _ = agree(world, lambda: chosen_loader(restored, data.value, loader))
            predictions = predict_run(restored, world, data.value, loader)
            classes = restored.classes
            if classes is not None:
                predictions = agree(world, lambda: with_labels(predictions, classes, ending=out.suffix))
            agree(world, lambda: write_predictions(predictions, out) if world.is_main else None)
            if world.is_main:
                with piped():
                    whose = f" for the loader {name!r}{' (the first; see --loader)' * (loader is None)}" if name else ""
                    typer.echo(f"predictions of {restored.where} of {run}{whose}: {out}")

        code = on_ranks(ranks, cpu, work, to_read=True, hang_seconds=settings.config.train.hang_seconds)
    raise typer.Exit(code)


def summary(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG | RECIPE.py] [KEY=VALUE ...]", help="As for `dtrain train`.", show_default=False
        ),
    ] = None,
) -> None:
    """Show a recipe's model: layers, shapes and parameters, for a batch of its data.

    Examples: dtrain summary; dtrain summary my_recipe.py hidden=32
    """
    with reported(), piped():
        from dtrain.cli.train import split_words
        from dtrain.config import load_settings

        target, overrides = split_words(words or [])
        settings = load_settings(target, overrides)
        from dtrain.distributed.lazy_dynamo import defer_dynamo
        from dtrain.engine.summary import batch_summary
        from dtrain.trainer.setup import load_task

        defer_dynamo()
        typer.echo(batch_summary(load_task(settings)))
