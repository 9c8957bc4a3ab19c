"""Two versions of a Python file: whether they differ in more than comments and formatting, and where first.

Syntax trees are compared, both parsed by this Python, so that a run may be resumed under another version. Docstrings
count: a program may read them.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Sequence

_LONGEST = 70  # characters of a line that is shown
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def parsed(content: bytes) -> ast.Module | None:
    """Returns a file's syntax tree, None where it has none; what Python warns of, it has warned of at the import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(content)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def first_change(before: bytes, now: bytes) -> str:
    """Returns where a file differs first, in words, with the line of the new version; nothing where it does not.

    Args:
        before: the file's content.
        now: and its content now.
    """
    if before == now:
        return ""
    old, new = parsed(before), parsed(now)
    if old is None or new is None:
        return "its content"  # of another Python version, or none at all
    return _first(old.body, new.body, now.decode(errors="replace").splitlines(), "")


def _first(old: Sequence[ast.stmt], new: Sequence[ast.stmt], lines: Sequence[str], path: str) -> str:
    for before, now in zip(old, new, strict=False):
        if ast.dump(before) == ast.dump(now):
            continue
        if type(before) is type(now) and isinstance(now, _NAMED) and before.name == now.name:  # type: ignore[attr-defined]
            inner = _first(before.body, now.body, lines, f"{path}{now.name}.")  # type: ignore[attr-defined]
            return inner or f"{path}{now.name}, {_shown(now, lines)}"  # its arguments, decorators or bases
        return _placed(path, _shown(now, lines))
    if len(new) > len(old):
        return _placed(path, _shown(new[len(old)], lines))
    if len(old) > len(new):
        gone = old[len(new)]
        return _placed(path, f"{getattr(gone, 'name', 'its end')} is gone")
    return ""


def _placed(path: str, where: str) -> str:
    return f"{path.removesuffix('.')}, {where}" if path else where


def _shown(node: ast.stmt, lines: Sequence[str]) -> str:
    line = node.lineno
    text = lines[line - 1].strip() if line <= len(lines) else ""
    shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return f"line {line}: `{shown}`"


@functools.lru_cache(maxsize=256)  # a notebook's or a script's next run has much the same files
def imports_in_functions(content: bytes, name: str) -> frozenset[str]:
    """Returns the names of the modules that a file's functions import, with the packages that these are in.

    Args:
        content: the file's.
        name: the file's, as in "nets/deep.py", from which relative imports start.
    """
    tree = parsed(content)
    functions = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, _NAMED[:2])]
    package = name.split("/")[:-1]
    found: set[str] = set()
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found.update([module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)])
    names = [one.split(".") for one in found if one]
    return frozenset(".".join(parts[:count]) for parts in names for count in range(1, len(parts) + 1))
