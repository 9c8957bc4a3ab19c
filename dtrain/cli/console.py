"""How a verb speaks: words or events, through which ranks, and how much of the library's own log."""

from __future__ import annotations

import atexit
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from dtrain.callbacks.progress.events import Events, emit_end
from dtrain.launch.monitor.exit_report import jointly_supervised

if TYPE_CHECKING:
    from dtrain.callbacks.progress.console_options import ConsoleOptions
    from dtrain.launch.supervisor import JobEnd


_AT_BEGIN = re.compile(r"^\r+", re.MULTILINE)


class LogFormat(str, Enum):
    """What is printed: bars on a terminal and lines elsewhere, one of the two, or events."""

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    JSON = "json"


class LogLevel(str, Enum):
    """How much dtrain's own log says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Format = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        help="auto: progress bars on a terminal, lines elsewhere. json: one event per "
        "line on standard output, and nothing else.",
    ),
]
# The backslash is rich's: without it, brackets in a help text are markup.
AllRanks = Annotated[
    bool, typer.Option("--all-ranks", help=r"Print output from all ranks, each line prefixed with \[rank N].")
]
Level = Annotated[
    LogLevel | None,
    typer.Option("--log-level", help="Level of dtrain's own log; default: warning.", show_default=False),
]


class Console:
    """What the command line asked for.

    Args:
        form: of what is printed.
        all_ranks: whether every rank speaks.
        level: of dtrain's log; None leaves it as it is.

    Attributes:
        events: takes events; None where words are wanted.
        voice: what a rank speaks with; None before `speak`.
    """

    def __init__(self, form: LogFormat, level: LogLevel | None = None, *, all_ranks: bool = False) -> None:
        self.events = Events() if form is LogFormat.JSON else None
        self.voice: ConsoleOptions | None = None
        self._form = form
        self._level = level
        self._all_ranks = all_ranks

    def check(self) -> None:
        """Refuses what does not go together.

        Raises:
            UsageError: bars of several ranks on one screen were asked for.
        """
        from dtrain.errors import UsageError

        if self._all_ranks and self._form is LogFormat.RICH:
            raise UsageError(
                "--all-ranks with --log-format rich: progress bars of several ranks do not fit on one screen. "
                "Use only one of the two; with --all-ranks alone, each rank prints lines."
            )

    def speak(self, rank: int) -> None:
        """Sets this process up to speak as one rank; from here on it prints in no other manner."""
        from dtrain.callbacks.progress.console_options import ConsoleOptions

        if self.events is not None:
            self.events.rank = rank if self._all_ranks else None
            self.events.take_stdout()
        elif self._all_ranks:
            for name in ("stdout", "stderr"):
                prefixed = Prefixed(getattr(sys, name), rank)
                setattr(sys, name, prefixed)
                atexit.register(prefixed.close_line)
        set_up_log(self._level, rank, self.events, all_ranks=self._all_ranks)
        view = "auto" if self._form is LogFormat.JSON else self._form.value
        self.voice = ConsoleOptions(view, self.events, self._all_ranks)  # type: ignore[arg-type]
        if rank > 0 and not jointly_supervised():  # whose supervisor lets them take turns
            self.voice.make_way()

    def emit_end(self, ending: JobEnd) -> None:
        """Tells how a job of local ranks ended, where it did not end well and events are wanted."""
        emit_end(self.events, ending)


def asked_for_events(arguments: Sequence[str]) -> bool:
    """Whether the arguments of `dtrain train` ask for JSON, as a launcher sees them that only passes them on."""
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    given = [second for first, second in itertools.pairwise(words) if first == "--log-format"]
    given += [word.partition("=")[2] for word in words if word.startswith("--log-format=")]
    return given[-1:] == [LogFormat.JSON.value]


class Prefixed:
    """A stream each of whose lines says which rank wrote it.

    Args:
        stream: takes the lines.
        rank: whose they are.
    """

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream = stream
        self._prefix = f"[rank {rank}] "
        self._begun = ""

    def write(self, text: str) -> int:
        """Writes whole lines, each in one piece with its prefix."""
        # What a carriage return would take back stays, as a line of its own: several ranks' bars share no line.
        whole = _AT_BEGIN.sub("", (self._begun + text).replace("\r\n", "\n"))
        *lines, self._begun = whole.replace("\r", "\n").split("\n")
        if lines:
            self._stream.write("".join(f"{self._named(line)}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Writes them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """What has begun waits for the end of its line, so that no other rank's comes into it."""
        self._stream.flush()

    def close_line(self) -> None:
        """Ends a line that has begun."""
        if self._begun:
            self.write("\n")

    def _named(self, line: str) -> str:
        return line if line.startswith(self._prefix) else self._prefix + line

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self._stream, name)


class _Last(logging.Handler):
    """Shows records that nobody else takes, as logging's own handler of last resort does.

    So whoever sets logging up himself, in his recipe or with a library, has dtrain's records there and not twice.
    """

    def __init__(self, rank: int, events: Events | None, *, all_ranks: bool, named: bool) -> None:
        super().__init__(logging.NOTSET)
        self._rank = rank
        self._events = events
        self._least = logging.WARNING if rank > 0 and not all_ranks else logging.NOTSET
        if named:
            self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        """Below a warning dtrain's own records alone are wanted, of rank 0 or of all."""
        own = record.name.partition(".")[0] == "dtrain"
        return record.levelno >= (self._least if own else logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line to what is standard error now, or an event."""
        try:
            if self._events is not None:
                said = {"level": record.levelname.lower(), "logger": record.name, "text": self.format(record)}
                self._events.tell("log", **said, of_rank=self._rank)
            else:
                sys.stderr.write(f"{self.format(record)}\n")
                sys.stderr.flush()
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(record)


def set_up_log(level: LogLevel | None, rank: int, events: Events | None, *, all_ranks: bool = False) -> None:
    """Has dtrain's log say so much, where no handler of the user's takes it.

    Args:
        level: below it nothing is said; None leaves that to the loggers, which say warnings.
        rank: this one; below a warning only rank 0 speaks, or each where all do.
        events: takes the records as events; None prints them.
        all_ranks: whether every rank speaks.
    """
    if level is not None:
        logging.getLogger("dtrain").setLevel(level.value.upper())
    named = events is None and level in {LogLevel.DEBUG, LogLevel.INFO}
    logging.lastResort = _Last(rank, events, all_ranks=all_ranks, named=named)
    if events is not None:
        _warnings_as_events(events, rank)


def _warnings_as_events(events: Events, rank: int) -> None:
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:  # noqa: PLR0917 - as in warnings
        if file is not None:
            shown(message, category, filename, lineno, file, line)
            return
        name = getattr(category, "__name__", "Warning")
        where = f"{filename}:{lineno}"
        events.tell("log", level="warning", logger="py.warnings", text=f"{where}: {name}: {message}", of_rank=rank)

    warnings.showwarning = show
