"""`dtrain report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.history import RunNames, RunsDir

_DEFAULT, _STDOUT = Path("report.html"), Path("-")
_PORT = 8765


def report(
    names: RunNames = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Write there (-: standard output); report.html, if that is new."
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it to this machine alone, live.")] = False,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help=f"With --serve: {_PORT}; 0 for any free one.")
    ] = None,
    runs: RunsDir = Path("runs"),
) -> None:
    """Make one page of runs: curves, a table, config differences, starts, failures; or serve it while training goes on.

    The page needs no other file and no network. With no run named it has all that there are; served, it also has those
    that come later.

    Examples: dtrain report a b -o report.html; dtrain report --serve; dtrain report digits-lr --serve --port 0
    """
    with reported():
        from dtrain.errors import UsageError

        if serve and out is not None:
            raise UsageError("-o and --serve: choose one; a served page is not written.")
        if port is not None and not serve:
            raise UsageError(f"--port {port}: goes with --serve.")
        if serve:
            _serve(names or [], runs, _PORT if port is None else port)
        else:
            _write(names or [], runs, out)


def _write(names: list[str], runs: Path, out: Path | None) -> None:
    from dtrain.errors import UsageError
    from dtrain.report.data import page_data
    from dtrain.report.files import check_target, write_bytes
    from dtrain.report.finding import find_runs
    from dtrain.report.render import render
    from dtrain.report.runs import read_run

    target = None if out == _STDOUT else check_target(out, _DEFAULT)
    found = [read_run(place) for place in find_runs(names, runs)]
    if not found:
        raise UsageError(f"there is no run in {runs} (looked in {Path.cwd()}). --dir names another folder of runs.")
    page = render(page_data(found, live=False)).encode()
    if target is not None:
        write_bytes(target, page)
    with piped():
        if target is None:
            sys.stdout.buffer.write(page)
        else:
            typer.echo(f"report: {target}")


def _serve(names: list[str], runs: Path, port: int) -> None:
    from dtrain.report.serve import Server, Site

    with Server(Site(names, runs), port) as server:
        for line in server.words():
            typer.echo(line)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended.")
