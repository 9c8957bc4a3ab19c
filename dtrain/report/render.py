"""Puts the page together: one file that needs no other, and allows no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).resolve().parent / "page"
_STYLES = ("vendor/uPlot.min.css", "css/base.css", "css/parts.css")
_SCRIPTS = ("values", "model", "charts", "legend", "table", "facts", "media", "timeline", "live", "main")


def render(data: Mapping[str, Any], *, live: bool = False) -> str:
    """Returns the page as HTML.

    Args:
        data: what `page_data` returned.
        live: whether it may ask the server that it came from for more.
    """
    parts = {
        "policy": policy(live=live),
        "style": style(),
        "script": script(),
        "data": embedded(data),
    }
    # In one go: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def embedded(data: Any) -> str:
    """Returns JSON that can end neither the element that it stands in nor a comment; ASCII alone."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(*, live: bool) -> str:
    """Returns the page's Content-Security-Policy: this style, this script, and nothing from anywhere else."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(script()),
        "style-src": _hash(style()),
        "img-src": "data:",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


@cache
def style() -> str:
    """Returns the page's one style sheet."""
    return "\n".join(map(_read, _STYLES))


@cache
def script() -> str:
    """Returns the page's one script; its parts share their names, and have none in common with anybody else's."""
    own = "\n".join(_read(f"js/{name}.js") for name in _SCRIPTS)
    licence = "\n".join(f" * {line}".rstrip() for line in _read("vendor/uPlot.LICENSE").splitlines())
    whole = f'/* uPlot:\n{licence}\n */\n{_read("vendor/uPlot.iife.min.js")}\n(() => {{\n"use strict";\n{own}\n}})();\n'
    if "</script" in whole.lower() or "<!--" in whole:
        raise AssertionError("the page's script would end its own element")
    return whole


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8").replace("\r\n", "\n")
