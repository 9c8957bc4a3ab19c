"""Checks of what a caller gives a function."""

from __future__ import annotations

from dtrain.errors import UsageError


def check_whole(**numbers: object) -> None:
    """Checks that arguments, given by their names, are whole numbers of at least 1.

    Raises:
        UsageError: one is not; it is named.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} = {number!r}: should be a whole number of at least 1.")


def check_positive(**numbers: object) -> None:
    """Checks that arguments, given by their names, are None or numbers above 0.

    Raises:
        UsageError: one is not; it is named.
    """
    for name, number in numbers.items():
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        if number is not None and not (real and number > 0):  # type: ignore[operator]
            raise UsageError(f"{name} = {number!r}: should be a number above 0, or None.")


def check_share(**numbers: object) -> None:
    """Checks that arguments, given by their names, are None or numbers above 0 and below 1.

    Raises:
        UsageError: one is not; it is named.
    """
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, float) and 0 < number < 1):
            raise UsageError(f"{name} = {number!r}: should be a number above 0 and below 1, or None.")


def check_switch(**values: object) -> None:
    """Checks that arguments, given by their names, are True or False.

    Raises:
        UsageError: one is not; it is named.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise UsageError(f"{name} = {value!r}: should be True or False.")
