"""`dtrain report`."""

from __future__ import annotations

import sys
import threading
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
            "-o",
            "--out",
            metavar="FILE",
            help="Output file (-: standard output); default: report.html, if there is none yet.",
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page live, on this machine only.")] = False,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help=f"Port for --serve; default: {_PORT}; 0: any free port."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="With --serve: allow all users of this machine.")
    ] = False,
    runs: RunsDir = Path("runs"),
) -> None:
    """Write an HTML page about runs: curves, a table, config differences, starts and failures; or serve it live.

    The page is one file and needs no network. Without RUN it shows all runs. With
    --serve it also shows runs that start later, to whoever has the address, which
    contains a token.

    Examples: dtrain report a b -o report.html; dtrain report --serve; dtrain report digits-lr --serve --port 0
    """
    with reported():
        from dtrain.errors import UsageError

        if serve and out is not None:
            raise UsageError("-o and --serve: use only one of them; a served page is not written to a file.")
        if port is not None and not serve:
            raise UsageError(f"--port {port}: needs --serve.")
        if no_token and not serve:
            raise UsageError("--no-token: needs --serve.")
        if serve:
            _serve(names or [], runs, _PORT if port is None else port, token=not no_token)
        else:
            _write(names or [], runs, out)


def _write(names: list[str], runs: Path, out: Path | None) -> None:
    from dtrain.errors import UsageError
    from dtrain.report.data import page_data
    from dtrain.report.files import check_target, write_bytes
    from dtrain.report.finding import find_runs, words_on_links
    from dtrain.report.render import render
    from dtrain.report.runs import read_run
    from dtrain.report.tables import damage_lines

    target = None if out == _STDOUT else check_target(out, _DEFAULT)
    found = [read_run(place) for place in find_runs(names, runs)]
    if not found:
        raise UsageError(f"no runs in {runs} (current folder: {Path.cwd()}). Set another folder of runs with --dir.")
    for line in (*damage_lines(found), *([] if names else words_on_links(runs))):
        typer.echo(f"dtrain: {line}", err=True)
    page = render(page_data(found, live=False)).encode()
    if target is not None:
        write_bytes(target, page)
    with piped():
        if target is None:
            sys.stdout.buffer.write(page)
        else:
            typer.echo(f"report: {target}")


def _serve(names: list[str], runs: Path, port: int, *, token: bool) -> None:
    from dtrain.report.access import Access
    from dtrain.report.finding import words_on_links
    from dtrain.report.serve import Server
    from dtrain.report.site import Site

    site = Site(names, runs)
    with Server(site, port, Access(wanted=token)) as server:
        for line in server.words():
            typer.echo(line)
        for line in () if names else words_on_links(runs):
            typer.echo(f"dtrain: {line}", err=True)
        threading.Thread(target=site.look, name="dtrain-site", daemon=True).start()  # before the first one asks
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended.")
