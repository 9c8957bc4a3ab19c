"""The typer application."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dtrain import __version__
from dtrain.cli import check, find
from dtrain.cli.bench import bench, bench_rank
from dtrain.cli.clean import clean
from dtrain.cli.doctor import doctor, doctor_node, doctor_rank
from dtrain.cli.evaluate import evaluate, predict, summary
from dtrain.cli.export import export
from dtrain.cli.guard import this_is_the_command_line
from dtrain.cli.history import history
from dtrain.cli.init import init
from dtrain.cli.joblogs import logs
from dtrain.cli.jobs import cancel, jobs, requeue
from dtrain.cli.keys import keys
from dtrain.cli.launch import launch
from dtrain.cli.plot import plot
from dtrain.cli.report import report
from dtrain.cli.slurm_job import slurm_job
from dtrain.cli.submit import submit
from dtrain.cli.sync import sync
from dtrain.cli.train import train
from dtrain.cli.values import TakesValues
from dtrain.launch.env.inherited import drop_inherited
from dtrain.launch.signals.process_exit import enforce_exit, leave, must_leave_at_once
from dtrain.launch.terminal.guarded import guard_output, say

app = typer.Typer(
    name="dtrain",
    help="Run your PyTorch training steps, unchanged, on one CPU or on many ranks.\n\n"
    "Examples: dtrain train; dtrain train my_recipe.py epochs=5 -n 2 --cpu; dtrain history",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (
    *(init, train, keys, evaluate, export, summary, bench, doctor),
    *(submit, jobs, logs, cancel, requeue),
    *(history, plot, report, clean, sync),
):
    _kind = TakesValues if _verb in (train, evaluate, export, summary, bench, submit) else None
    app.command(name=_verb.__name__, cls=_kind)(_verb)
app.command(name="bench-rank", hidden=True)(bench_rank)
app.command(name="doctor-rank", hidden=True)(doctor_rank)
app.command(name="doctor-node", hidden=True)(doctor_node)
# What it writes was named by --output once; every verb says --out now.
_renamed = {"token_normalize_func": lambda name: {"output": "out"}.get(name, name)}
app.command(name="predict", cls=TakesValues, context_settings=_renamed)(predict)
# What follows the script is the script's, options included.
app.command(name="launch", context_settings={"allow_interspersed_args": False})(launch)
app.command(name="slurm-job", hidden=True)(slurm_job)
app.add_typer(check.app, name="check")
app.add_typer(find.app, name="find")


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


def needed(words: Sequence[str]) -> typer.Typer:
    """Returns as much of the application as a command line needs.

    Typer makes the options of all verbs first, which takes each process 0.1 s.

    Args:
        words: of the command line, without the program's name.

    Returns:
        the application with the verb that comes first, and no other; the whole where none does.
    """
    one = copy.copy(app)
    one.registered_commands = [command for command in app.registered_commands if command.name in words[:1]]
    one.registered_groups = [group for group in app.registered_groups if group.name in words[:1]]
    return one if one.registered_commands or one.registered_groups else app


def main() -> None:
    """Runs the command line; the console script `dtrain`."""
    this_is_the_command_line()
    guard_output()
    whose = drop_inherited()
    if whose:
        say(f"dtrain: note: started by {whose} of another job; this process is no part of that, and works for itself.")
    try:
        needed(sys.argv[1:])()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        enforce_exit(code)
        if must_leave_at_once():
            leave(code)
        raise
