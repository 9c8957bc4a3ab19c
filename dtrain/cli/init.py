"""`dtrain init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import reported


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Made where it is missing.")] = Path(),
    template: Annotated[
        str,
        typer.Option(
            "--template", "-t", metavar="NAME", help="function, script, keras, text, tabular or image-folder."
        ),
    ] = "function",
) -> None:
    """Write files to begin with, which run as they are. Nothing is overwritten.

    function, text, tabular and image-folder are a recipe and train.yaml, which `dtrain train` takes in that folder
    where nothing else is named. script and keras are a script with its own loop, and in Keras' manner.

    Examples: dtrain init mine; dtrain init --template script; dtrain init pets -t image-folder
    """
    with reported():
        from dtrain.scaffold import named, write

        chosen = named(template)
        for file in write(chosen, folder):
            typer.echo(f"wrote {file}")
        commands = [shlex.join(["cd", str(folder)])] * (folder != Path()) + list(chosen.commands)
        typer.echo("next: " + "\n      ".join(commands))
