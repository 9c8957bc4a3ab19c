"""Beginners' mistakes: each ends in the message that docs/mistakes.md shows, and in no traceback of dtrain's own."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.mistakes import COLUMNS, MISTAKES, PAGE, messages

_GPU = ".cuda()"  # a mistake only where there is none


def told(text: str) -> str:
    """What dtrain says of it, without the traceback, whose last line is torch's."""
    words = text[text.find("dtrain: error") :] if "dtrain: error" in text else text
    return re.sub(r"AssertionError|RuntimeError", "Error", words)  # of a torch with CUDA and of one without


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    return {title: text for title, text in messages().items() if not (_GPU in title and torch.cuda.is_available())}


def test_each_ends_in_the_message_that_the_page_shows(said: dict[str, str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = {}
    for part in page.split("\n## ")[1:]:
        title, _, rest = part.partition("\n")
        shown[title] = re.findall(r"```text\n(?:\$ [^\n]*\n)?(.*?)\n```", rest, re.DOTALL)[-1]
    assert list(shown) == [mistake.title for mistake in MISTAKES]
    for title, text in said.items():
        assert told(text) == told(shown[title]), f"{title}: run `cd tests && python -m helpers.mistakes`"


def test_each_message_fits_the_screen_and_blames_nobody_else(said: dict[str, str]) -> None:
    assert len(said) >= 30
    for title, text in said.items():
        assert text, title
        assert "dtrain itself" not in text, title
        assert "/dtrain/" not in text, f"{title}: a frame of dtrain's"
        code = [line for line in text.splitlines() if line.startswith("    ")]
        assert all(len(line) <= COLUMNS for line in text.splitlines() if line not in code), title
