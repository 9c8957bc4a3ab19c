"""Command lines, parsed by dtrain's own command line, and not run."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

import typer

from dtrain.cli.app import app
from dtrain.cli.launch import VERBS


@cache
def root() -> Any:
    """Returns the whole command, with its verbs in `commands`."""
    return typer.main.get_command(app)


def verbs() -> dict[str, Any]:
    """Returns all verbs, those of a verb's own too ("check parity"), without the hidden ones."""
    found: dict[str, Any] = {}
    open_ = {name: command for name, command in root().commands.items() if not command.hidden}
    while open_:
        name, command = open_.popitem()
        inner = getattr(command, "commands", {})
        open_ |= {f"{name} {one}": verb for one, verb in inner.items() if not verb.hidden}
        if not inner:
            found[name] = command
    return found


def parse(line: str) -> None:
    """Parses `dtrain VERB ...`; what is wrong with it raises as it would end the command.

    Raises:
        Exception: click's UsageError, of a verb or an option that there is not, or a value that does not fit.
    """
    words = shlex.split(line)
    parse_words(words[words.index("dtrain") + 1 :])


def parse_words(words: list[str]) -> None:
    """Parses what comes after `dtrain`."""
    command, context = root(), None
    while hasattr(command, "commands"):
        context = command.make_context("dtrain", list(words), parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert not command.hidden, f"{name} is no verb for people"
    inner = command.make_context(name, list(words), parent=context)
    program = inner.params.get("program")
    if program in VERBS:
        parse_words([program, *inner.params["arguments"]])


def commands_of(line: str) -> list[str]:
    """Returns the dtrain commands in a line of a shell: those after && and |, and behind a launcher, too."""
    found: list[list[str]] = [[]]
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    for word in lexer:
        if set(word) <= set("|&;"):
            found.append([])
        elif word in ("<", ">", "2>"):
            found[-1].append("\n")  # what follows is a file
        else:
            found[-1].append(word)
    starts = [shlex.join(words[words.index("dtrain") :]) for words in map(_without_files, found) if "dtrain" in words]
    return [start for start in starts if start != "dtrain"]


def _without_files(words: list[str]) -> list[str]:
    return words[: words.index("\n")] if "\n" in words else words
