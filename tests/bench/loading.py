"""The rivals: files of `rivals/`, loaded by name, each alone in its processes."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

RIVALS = Path(__file__).resolve().parent / "rivals"

# How a script is started on two ranks; {port} is a free one. A rival's file names the way its documentation shows.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port={port}")
PYTHON = (sys.executable,)


class Reported(NamedTuple):
    """What a trainer tells its user of one validation pass; None for what it does not offer."""

    loss: float | None
    metric: float | None


class Rival(Protocol):
    """What a file of `rivals/` defines. The rival itself is imported in functions alone.

    Attributes:
        PACKAGE: the distribution's name.
        LAUNCH: the words that start a script on two CPU ranks.
        ENV: variables for its processes.
        NUMBERS: way of use -> function(nine), which validates on the ranks it runs on.
        SPEED: way of use -> function(problem, epochs, between), which trains and calls
            `between(loss=, accuracy=, val_loss=, val_accuracy=)` once in every epoch, always at the same point.
    """

    PACKAGE: str
    LAUNCH: tuple[str, ...]
    ENV: dict[str, str]
    NUMBERS: dict[str, Callable[[Any], Reported]]
    SPEED: dict[str, Callable[[Any, int, Callable[..., None]], None]]


def names() -> list[str]:
    """All rivals; dtrain last."""
    found = sorted(file.stem for file in RIVALS.glob("*.py") if file.stem not in ("__init__", "dtrain"))
    return [*found, "dtrain"]


def load(name: str) -> Any:
    """The module of one rival (a `Rival`)."""
    return importlib.import_module(f"bench.rivals.{name}")


def version(package: str) -> str | None:
    """An installed distribution's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def chosen(only: str | None) -> list[str]:
    """The rivals of a command line's `--only NAME,...`, all without it."""
    wanted = names() if only is None else only.split(",")
    unknown = [name for name in wanted if name not in names()]
    if unknown:
        raise SystemExit(f"no rival named {', '.join(unknown)}; there are {', '.join(names())}")
    return wanted
