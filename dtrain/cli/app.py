"""The typer application."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from typing import Annotated, NoReturn

import typer

from dtrain import __version__
from dtrain.cli import check
from dtrain.cli.evaluate import evaluate, predict, summary
from dtrain.cli.train import train

app = typer.Typer(
    name="dtrain",
    help="Your PyTorch training steps, unchanged, on one CPU or many ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (train, evaluate, predict, summary):
    app.command()(_verb)
app.add_typer(check.app, name="check")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dtrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; the console script `dtrain`."""
    try:
        app()
    except SystemExit as end:
        if read_size() > 1 and "torch.distributed" in sys.modules:
            _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def read_size() -> int:
    """Returns the number of ranks that this process is one of."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1


def _leave(code: int) -> NoReturn:
    """Ends a rank without tearing the interpreter down.

    gloo's threads may still hold tensors then, ask for the interpreter's lock, and abort the process
    ("terminate called without an active exception"), after a run that went well.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
