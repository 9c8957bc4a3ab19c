"""`dtrain init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import reported


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Created if missing.")] = Path(),
    template: Annotated[
        str,
        typer.Option(
            "--template", "-t", metavar="NAME", help="function, script, keras, text, tabular or image-folder."
        ),
    ] = "function",
) -> None:
    """Write starter files that run as they are. Nothing is overwritten.

    function, text, tabular and image-folder are a recipe and a train.yaml, which
    `dtrain train` in that folder uses by default. script is a script with its own
    loop, keras one with KerasModel.

    Examples: dtrain init mine; dtrain init --template script; dtrain init pets -t image-folder
    """
    with reported():
        from dtrain.cli.scaffold import named, write

        chosen = named(template)
        for file in write(chosen, folder):
            typer.echo(f"wrote {file}")
        commands = [shlex.join(["cd", str(folder)])] * (folder != Path()) + list(chosen.commands)
        typer.echo("next: " + "\n      ".join(commands))
