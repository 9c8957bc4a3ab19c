"""A table in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_REMARK_WIDTH = 60


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as they need to be; the last one is wrapped."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head) - 1)]
    for row in [head, ["-" * width for width in widths] + [""], *rows]:
        wrapped = textwrap.wrap(row[-1], _REMARK_WIDTH) or [""]
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        for number, remark in enumerate(wrapped):
            lead = cells if number == 0 else [" " * width for width in widths]
            print("  ".join([*lead, remark]).rstrip())
