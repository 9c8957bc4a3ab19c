"""One check's result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from dtrain.errors import EXIT_FAILED, EXIT_OK

State = Literal["pass", "warn", "fail", "skip"]
STATES: tuple[State, ...] = ("pass", "warn", "fail", "skip")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of what was looked at, in a word or two.
        state: "warn" where training may be slow or may fail later, "fail" where it cannot work, "skip" where there
            was nothing to look at.
        measured: what was seen, in one line.
        remedy: what to do about it, in one line; empty where there is nothing to be done.
    """

    name: str
    state: State
    measured: str
    remedy: str = ""


def passed(name: str, measured: str) -> Finding:
    """Returns a finding with nothing to be done about it."""
    return Finding(name, "pass", measured)


def exit_code(findings: Iterable[Finding]) -> int:
    """Returns 1 where a check failed, else 0: a warning is said, and is no failure."""
    return EXIT_FAILED if any(one.state == "fail" for one in findings) else EXIT_OK


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Returns a check's finding; where it could not be made, a failure that says so, and the others go on."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - told in full
        why = f"could not be checked: {type(error).__name__}: {error}"
        return Finding(name, "fail", why, "check what this machine forbids, or report it as a bug")
