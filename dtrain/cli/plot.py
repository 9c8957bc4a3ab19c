"""`dtrain plot`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.history import RunNames, RunsDir

if TYPE_CHECKING:
    from dtrain.report.curves import Panel

_MOST_PANELS = 4  # in a terminal, where no metric is named
_MOST_NAMED = 20
_PIPE_WIDTH = 100


def plot(
    names: RunNames = None,
    *,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.png|svg|pdf", help="Save the plot to this file.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="NAME", help="loss: training and validation; val_loss: validation only; repeatable."
        ),
    ] = None,
    x: Annotated[str, typer.Option("--x", metavar="epoch|time|COLUMN", help="What to put on the x axis.")] = "epoch",
    log: Annotated[bool, typer.Option("--log", help="Log scale for values.")] = False,
    runs: RunsDir = Path("runs"),
) -> None:
    """Plot the curves of runs, one panel per metric, training dashed; without -o as text on the terminal.

    Without RUN, the run that changed last.

    Examples: dtrain plot; dtrain plot a b -o curves.png; dtrain plot a b --metric val_loss --log --x time
    """
    with reported(), piped():
        from dtrain.errors import UsageError
        from dtrain.report.curves import make_panels
        from dtrain.report.finding import find_runs
        from dtrain.report.runs import read_run
        from dtrain.report.tables import damage_lines

        if out is not None:
            check_kind(out)
        places = find_runs(names or [], runs)
        if not places:
            raise UsageError(
                f"no runs in {runs} (current folder: {Path.cwd()}). Set another folder of runs with --dir."
            )
        found = [read_run(place) for place in (places if names else places[:1])]
        panels = make_panels(found, metric or [], x)
        empty = [run.name for run in found if not run.cells]
        for line in damage_lines(found):
            typer.echo(f"dtrain: {line}", err=True)
        if empty:
            typer.echo(f"dtrain: not plotted, no epochs yet: {', '.join(empty)}", err=True)
        if out is None:
            print_panels(panels, x=x, log=log, most=None if metric else _MOST_PANELS)
        else:
            _write(out, panels, x=x, log=log)


def kind_of(out: Path) -> str:
    """Returns the kind of picture that a file's name asks for."""
    return out.suffix.removeprefix(".").lower()


def check_kind(out: Path) -> None:
    """Refuses, before any work is done for it, a picture that cannot be written.

    Raises:
        UsageError: by kind or by place.
    """
    from dtrain.errors import UsageError
    from dtrain.report.files import check_target
    from dtrain.report.picture import FORMATS

    if kind_of(out) not in FORMATS:
        raise UsageError(f"-o {out}: should end in .{', .'.join(FORMATS)}.")
    check_target(out, out)


def _write(out: Path, panels: Sequence[Panel], *, x: str, log: bool) -> None:
    from dtrain.report.files import write_bytes
    from dtrain.report.picture import picture

    write_bytes(out.expanduser(), picture(panels, x=x, log=log, kind=kind_of(out)))
    typer.echo(f"plot: {out}")
    for panel in panels:
        for remark in panel.remarks(log=log):
            typer.echo(f"  {remark}")


def print_panels(panels: Sequence[Panel], *, x: str, log: bool, most: int | None) -> None:
    """Prints curves as text; in a pipe the same without colours."""
    import shutil

    from rich.console import Console
    from rich.text import Text

    from dtrain.report.textplot import PlotStyle, legend, text_panel

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, no_color=None if terminal else True)
    width = shutil.get_terminal_size().columns if terminal else _PIPE_WIDTH
    braille = _can_show("\N{BRAILLE PATTERN DOTS-1}┤")
    look = PlotStyle(x, log, width, braille=braille)
    shown = panels[:most]
    with console.capture() as captured:
        for panel in shown:
            for line in text_panel(panel, look):
                text = Text.assemble(*((piece, style or "") for piece, style in line))
                console.print(text if braille else Text(text.plain.replace("┤", "|")))
        whose = legend([line for panel in shown for line in panel.lines])
        console.print(Text.assemble(*((piece, style or "") for piece, style in whose)))
        if len(shown) < len(panels):
            rest = [panel.title for panel in panels[len(shown) :]]
            more = f", and {len(rest) - _MOST_NAMED} more" if len(rest) > _MOST_NAMED else ""
            console.print(f"not shown: {', '.join(rest[:_MOST_NAMED])}{more} (--metric NAME)")
    typer.echo(captured.get(), nl=False)


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
