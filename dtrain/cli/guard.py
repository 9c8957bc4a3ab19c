"""Turns whatever ends a verb into one message and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

from dtrain.errors import EXIT_INTERRUPTED, EXIT_OK, AgreedError, DtrainError
from dtrain.events import Events, tell_failure
from dtrain.launch.reports import Told, supervised, write_report


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
            write_report(int(os.environ["RANK"]), EXIT_OK, "")
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _tell("dtrain: stopped by Ctrl-C. What is written so far is kept.", EXIT_INTERRUPTED, events, agreed=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - described in full, then the process ends
        sys.last_value = error  # as the interpreter notes it; exit functions then do not wait for other ranks
        text, code, told = _words(error)
        _tell(text, code, events, told, agreed=isinstance(error, DtrainError) and error.agreed)
        raise typer.Exit(code) from None


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Lets whoever reads the output, such as `head`, go when it has seen enough; the verb then ends without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _words(error: BaseException) -> tuple[str, int, Told]:
    if isinstance(error, AgreedError):
        return str(error), error.exit_code, Told("exception", error.failures[0].kind, str(error), "")
    from dtrain.failures import explain

    found = explain(error)
    return found.text, found.exit_code, found.told


def _tell(text: str, code: int, events: Events | None, told: Told | None = None, *, agreed: bool) -> None:
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if supervised():
        write_report(int(rank), code, text, told)
        return
    if agreed and size != "1" and rank != "0":
        return
    print(text if size == "1" else f"[rank {rank}] {text}", file=sys.stderr)  # noqa: T201
    if events is not None:
        with contextlib.suppress(OSError):  # nobody listens any more
            tell_failure(events, code, text, rank=int(rank), cause=None if told is None else told.cause)
