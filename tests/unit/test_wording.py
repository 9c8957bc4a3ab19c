"""Numbers, counts and long lines as people see them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.wording import counted, large, number, wrapped


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (0.0004, "0.0004"),
        (9.99994, "10"),
        (12.3456, "12.35"),
        (-1234.56, "-1235"),
        (0.0, "0"),
        (0.0000123456, "1.235e-05"),
        (56789.4, "56789"),
        (12345678.0, "1.235e+07"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_number_is_the_value_to_four_digits(value: float) -> None:
    assert abs(float(number(value)) - value) <= abs(value) * 0.5001e-3 + 5e-324


def test_counts() -> None:
    assert [large(count) for count in (0, 999, 4506, 12_034, 1_206_000, 7.2419e9)] == [
        *("0", "999", "4,506", "12.03k", "1.206M", "7.242G")
    ]
    assert [counted(count, "epoch") for count in (0, 1, 1438)] == ["0 epochs", "1 epoch", "1,438 epochs"]
    assert counted(2, "batch") == "2 batches"


def test_words_break_at_words_and_code_stays_whole() -> None:
    code = "    " + "x" * 50
    text = f"Traceback:\n{code}\ndtrain: error: one two three four five six\n  a note of some more words than fit here"
    assert wrapped(text, 30).splitlines() == [
        "Traceback:",
        code,
        "dtrain: error: one two three",
        "four five six",
        "  a note of some more words",
        "    than fit here",
    ]
    assert wrapped(text, 200) == text
    assert wrapped("device: cpu, fp32; run: runs/first", 28) == "device: cpu, fp32;\nrun: runs/first"
