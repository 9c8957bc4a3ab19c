"""How numbers, counts and long lines are shown to people: one way for all of dtrain."""

from __future__ import annotations

import math
import re
import textwrap

_WHOLE, _MOST = 1e4, 1e6  # from the first up to the second, a number is shown without decimals
_LABEL = re.compile(r"(\w:) (?=\S*/)")  # of a path
_LETTERS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))


def number(value: float) -> str:
    """Returns a number with four significant digits: "0.3121", "0.0004", "12.35", "56789", "1.234e-05"."""
    value = float(value)
    if math.isfinite(value) and _WHOLE <= abs(value) < _MOST:
        return f"{value:.0f}"
    return f"{value:.4g}"


def large(count: float) -> str:
    """Returns a count with four significant digits: "4,506", "12.03k", "1.206M", "7.242G"."""
    for factor, letter in _LETTERS:
        if abs(count) >= factor:
            return f"{count / (1e3 if letter == 'k' else factor):.4g}{letter}"
    return f"{count:,}"


def counted(count: int, what: str) -> str:
    """Returns "1 rank", "2 ranks", "1,438 samples": the noun in its plural where there is not one of it."""
    return f"{count:,} {what}{'' if count == 1 else 'es' if what.endswith('tch') else 's'}"


def wrapped(text: str, width: int) -> str:
    """Returns a text whose lines break at words where they are wider; the lines of a traceback stay whole.

    A path stays beside its label, as in "run: runs/first".

    Args:
        text: lines of a message.
        width: in characters.
    """
    lines, noted = [], False
    for line in text.split("\n"):
        noted = noted or line.startswith("dtrain: ")  # what is indented below that are notes in words
        if len(line) <= width or (line.startswith(" ") and not noted):
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        more = f"{indent}  " if indent else ""
        lines += textwrap.wrap(
            _LABEL.sub(r"\1\0", line.strip()),
            max(width, 20),
            initial_indent=indent,
            subsequent_indent=more,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines).replace("\0", " ")
