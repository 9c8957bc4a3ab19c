"""Findings for a person, in a table on a terminal and in lines elsewhere; and for a program, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dtrain import __version__
from dtrain.tools.doctor.finding import STATES, Finding, exit_code

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_COUNTED = {"pass": "passed", "warn": "warning", "fail": "failed", "skip": "skipped"}

Rows = Sequence[Sequence[str]]


def json_text(findings: Sequence[Finding], **more: Any) -> str:
    """Returns all as one JSON text."""
    worst = next((state for state in ("fail", "warn") if any(one.state == state for one in findings)), "pass")
    told = {"dtrain": __version__, "worst": worst, "exit_code": exit_code(findings)}
    return json.dumps({**told, **more, "findings": [asdict(one) for one in findings]}, indent=2)


def lines_of(finding: Finding, width: int = 0) -> list[str]:
    """Returns a finding in one line, and a second one with the remedy."""
    mark = "-" if finding.state == "skip" else finding.state
    lines = [f"{mark:<4}  {finding.name:<{width}}  {finding.measured}"]
    return lines + ([f"      {'':<{width}}  remedy: {finding.remedy}"] if finding.remedy else [])


def summary(findings: Iterable[Finding]) -> str:
    """Returns the last line: "12 passed, 1 warning, 0 failed"."""
    states = [one.state for one in findings]
    counted = [(state, states.count(state)) for state in STATES]
    shown = [
        (count, _COUNTED[state] + "s" * (state == "warn" and count != 1))
        for state, count in counted
        if count or state == "fail"
    ]
    return ", ".join(f"{count} {word}" for count, word in shown)


def show(findings: Sequence[Finding], head: Rows = ()) -> None:
    """Prints findings.

    Args:
        findings: in the order of their checks.
        head: the rows of a table before them, its titles first; may be empty.
    """
    if sys.stdout.isatty():
        _show_tables(findings, head)
    else:
        _show_lines(findings, head)


def _show_lines(findings: Sequence[Finding], head: Rows) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*head, strict=True)]
    for row in head:
        _print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    width = max((len(one.name) for one in findings), default=0)
    for one in findings:
        for line in lines_of(one, width):
            _print(line)
    _print(summary(findings))


def _show_tables(findings: Sequence[Finding], head: Rows) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if head:
        nodes = Table(*head[0], box=None, header_style="bold")
        for row in head[1:]:
            nodes.add_row(*map(Text, row))
        console.print(nodes)
    table = Table(box=None, show_header=False, padding=(0, 1))
    for one in findings:
        colour = _COLOURS[one.state]
        said = Text(one.measured)
        if one.remedy:
            said.append(f"\n{one.remedy}", style="italic")
        table.add_row(Text("-" if one.state == "skip" else one.state, style=colour), Text(one.name), said)
    console.print(table)
    console.print(Text(summary(findings)))


def _print(text: str) -> None:
    print(text)  # noqa: T201
