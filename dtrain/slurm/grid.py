"""Parameter grids: `lr=1e-3,1e-4 seed=1,2,3` is six runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from dtrain.errors import UsageError

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""
_FIXED = ("recipe", "run")  # keys and sections that an array's runs have in common


def read_grid(texts: Sequence[str]) -> list[list[str]]:
    """Returns the runs of a grid, each as the `key=value` words that it differs in.

    Args:
        texts: `key=value,value ...`; white space parts keys, commas part values, neither within brackets or quotes.
            Quotes stay: they are YAML's, as in a config.

    Returns:
        all combinations; the last key changes fastest.

    Raises:
        UsageError: it is no grid, or has a key or a run twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        for word in _split(text, " \t\n", text):
            if not word:
                continue
            key, equals, values = word.partition("=")
            if not equals or not key:
                raise UsageError(f"--array {text!r}: {word!r} should be key=value,value, such as lr=1e-3,1e-4.")
            if key.partition(".")[0] in _FIXED:
                raise UsageError(
                    f"--array {text!r}: {key} should be the same for all runs; pass it as {key}=... outside of --array."
                )
            if key in axes:
                raise UsageError(f"--array {text!r}: {key} should appear once, with all its values.")
            axes[key] = _values(key, values, text)
    if not axes:
        raise UsageError("--array '': should be key=value,value ..., such as 'lr=1e-3,1e-4 seed=1,2,3'.")
    return [list(run) for run in itertools.product(*([f"{key}={one}" for one in axes[key]] for key in axes))]


def _values(key: str, text: str, whole: str) -> list[str]:
    values = list(_split(text, ",", whole))
    if "" in values:
        raise UsageError(f"--array {whole!r}: a value of {key} is missing; write null for none.")
    twice = next((one for number, one in enumerate(values) if one in values[:number]), None)
    if twice is not None:
        raise UsageError(f"--array {whole!r}: {key}={twice} should appear once.")
    return values


def _split(text: str, separators: str, whole: str) -> Iterator[str]:
    """Yields what is between separators that stand in no bracket and no quotes."""
    depth, quote, start = 0, "", 0
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in _QUOTES:
            # Within a word a quote is a character like any other, as in YAML.
            quote = char if place == start or text[place - 1] in "=, [{(:" else ""
        elif char in _OPENING:
            depth += 1
        elif char in _CLOSING:
            depth -= 1
        elif char in separators and depth == 0:
            yield text[start:place]
            start = place + 1
        if depth < 0:
            break
    if depth or quote:
        raise UsageError(f"--array {whole!r}: {quote or 'a bracket'} is not balanced.")
    yield text[start:]
