"""Turns whatever ends a verb into one message and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

from dtrain.callbacks.progress.events import Events, emit_failure
from dtrain.errors import EXIT_INTERRUPTED, EXIT_OK, AgreedError, DtrainError
from dtrain.launch.monitor.exit_report import (
    ExceptionInfo,
    identity,
    jointly_supervised,
    supervised,
    write_report,
)
from dtrain.launch.signals.stop_request import is_ctrl_c
from dtrain.launch.terminal.guarded import readers_matter, say

_command_line: list[bool] = []


def this_is_the_command_line() -> None:
    """Says that this process was started as the command `dtrain`, and ends with the verb."""
    _command_line[:] = [True]


def is_command_line() -> bool:
    """Whether this process was started as the command `dtrain`, and not by code that calls a verb."""
    return bool(_command_line)


@contextlib.contextmanager
def reported(events: Events | None = None) -> Iterator[None]:
    """Prints a failure once, where a person will see it, and exits with its code.

    Args:
        events: is told of it, too.

    Under dtrain's own supervisor the text goes to it; it prints the first cause alone. Under another
    launcher each rank prints for itself, but what all ranks agreed on is printed by rank 0.
    """
    try:
        yield
        if supervised():
            write_report(EXIT_OK, "")
    except (typer.Exit, typer.Abort):
        raise
    except BaseException as error:  # noqa: BLE001 - described in full, then the process ends
        if is_ctrl_c(error):
            _print("dtrain: stopped by Ctrl-C. Files written so far are kept.", EXIT_INTERRUPTED, events, agreed=False)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        sys.last_value = error  # as the interpreter notes it; exit functions then do not wait for other ranks
        text, code, told = _words(error)
        _print(text, code, events, told, agreed=isinstance(error, DtrainError) and error.on_all_ranks)
        raise typer.Exit(code) from None


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Lets whoever reads the output, such as `head`, go when it has seen enough; the verb then ends without a word."""
    try:
        with readers_matter():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _words(error: BaseException) -> tuple[str, int, ExceptionInfo]:
    if isinstance(error, AgreedError):
        return str(error), error.exit_code, ExceptionInfo("exception", error.failures[0].kind, str(error), "")
    from dtrain.launch.monitor.describe import explain

    found = explain(error)
    return found.text, found.exit_code, found.told


def _print(text: str, code: int, events: Events | None, told: ExceptionInfo | None = None, *, agreed: bool) -> None:
    me = identity()
    if supervised():
        write_report(code, text, told)
    if jointly_supervised():
        return
    if agreed and me.size > 1 and me.rank > 0:
        return
    say(text if me.size == 1 else f"[rank {me.rank}] {text}")
    if events is not None:
        emit_failure(events, code, text, rank=me.rank, cause=None if told is None else told.cause)
