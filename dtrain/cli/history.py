"""`dtrain history`."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.guard import piped, reported

if TYPE_CHECKING:
    from dtrain.report.compare import Comparison
    from dtrain.report.runs import Run
    from dtrain.report.tables import Grid

RunNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN ...]",
        help="A run's folder, its name under run.dir, its history.csv, or a folder of runs.",
        show_default=False,
    ),
]
RunsDir = Annotated[
    Path, typer.Option("--dir", metavar="RUNS", envvar="DTRAIN_RUN__DIR", help="Folder of runs (run.dir).")
]


def history(
    names: RunNames = None,
    *,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Column that decides which epoch is best.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode", metavar="min|max", help="Whether lower (min) or higher (max) is better; default: by its name."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all columns and epochs, even if they do not fit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, with all rows.")] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="The histories as CSV; several runs one after the other.")
    ] = False,
    runs: RunsDir = Path("runs"),
) -> None:
    """Show the history of a run, or several runs side by side; without RUN, list all runs.

    On a terminal a long history is cut to the first four, the best and the last
    twelve epochs, and a wide one to the columns that fit, metrics first; runs that
    ended before their first epoch are counted. A line says what is left out.

    Examples: dtrain history; dtrain history digits-lr; dtrain history a b --metric val_accuracy; dtrain history a --csv
    """
    with reported(), piped():
        from dtrain.errors import UsageError
        from dtrain.report.compare import as_plain, compare
        from dtrain.report.finding import find_runs, words_on_links
        from dtrain.report.runs import read_run
        from dtrain.report.tables import damage_lines

        if mode not in (None, "min", "max"):
            raise UsageError(f"--mode {mode}: should be min or max.")
        if as_json and as_csv:
            raise UsageError("--json and --csv: use only one of them.")
        places = find_runs(names or [], runs)
        found = [read_run(place) for place in places]
        if not found:
            raise UsageError(
                f"no runs in {runs} (current folder: {Path.cwd()}). Set another folder of runs with --dir."
            )
        whole = compare(found, metric, mode)  # type: ignore[arg-type]
        if as_json:
            typer.echo(json.dumps(as_plain(whole, rows=bool(names)), indent=1, allow_nan=False))
        elif as_csv:
            typer.echo(_csv(found), nl=False)
        else:
            _show(found, whole, listed=not names, chosen=metric, width=None if everything else _width())
            for line in (*damage_lines(found), *([] if names else words_on_links(runs))):
                typer.echo(line)


def _width() -> int | None:
    """Returns the terminal's width; None where the output is no terminal, and so has room for all."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _show(runs: Sequence[Run], whole: Comparison, *, listed: bool, chosen: str | None, width: int | None) -> None:
    from dtrain.report.finding import changed
    from dtrain.report.tables import about, comparison_grid, folded_words, history_grid, listing_grid

    mode = whole.mode if chosen is not None else None
    if listed:
        shown = [run for run in runs if not run.left_nothing] if width is not None else runs
        grid = listing_grid(shown, [changed(run.folder) for run in shown], chosen, mode)
        _print(grid.fitted(width, ("CHANGED", "EPOCHS", "STATE")))
        for line in folded_words(len(runs) - len(shown)):
            typer.echo(line)
    elif len(runs) > 1:
        _print(comparison_grid(whole).fitted(width, ("STARTS", "STATE", "EPOCHS")))
    else:
        typer.echo(about(runs[0]))
        if runs[0].cells:
            _print(history_grid(runs[0], metric=whole.metric, mode=whole.mode, width=width))


def _print(grid: Grid) -> None:
    head, *rows = grid.lines()
    colour = False if os.environ.get("NO_COLOR") else None  # None: on a terminal
    typer.secho(head, bold=True, color=colour)
    for index, row in enumerate(rows):
        typer.secho(row, fg="green" if index in grid.marked else None, color=colour)
    for line in grid.under:
        typer.echo(line)


def _csv(runs: Sequence[Run]) -> str:
    """One history as its file has it; several with the run's name before each row, and all columns of any run."""
    out = io.StringIO()
    writer: Any = csv.writer(out, lineterminator="\n")
    if len(runs) == 1:
        writer.writerows([runs[0].columns, *runs[0].cells] if runs[0].columns else [])
        return out.getvalue()
    columns = list(dict.fromkeys(name for run in runs for name in run.columns))
    writer.writerow(["run", *columns])
    for run in runs:
        texts = [run.texts(name) for name in columns]
        writer.writerows([run.name, *row] for row in zip(*texts, strict=True))
    return out.getvalue()
