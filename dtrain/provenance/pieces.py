"""The code of what a call is given: functions and classes of a script or notebook one by one, modules as whole files.

A script that calls `train_model` has much besides the steps. What counts is what the call's objects lead to: their
functions and classes, and what these name in turn, with the plain constants among it.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import logging
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from dtrain.provenance.code import Code
from dtrain.provenance.loading import is_installed

logger = logging.getLogger(__name__)

_CONSTANTS = "constants.py"
_PLAIN = (bool, int, float, str, type(None))
_MOST_DEPTH, _MOST_ITEMS = 6, 1000
_MOMENTS = (1e9, 1e11)  # seconds since 1970, which are others at each start


class Reached:
    """What a call's objects lead to.

    Args:
        roots: name -> object.

    Attributes:
        pieces: name -> the source of a function or class that belongs to no module's file.
        modules: names of the modules of the user's own.
        constants: name -> a plain value that these functions read and never set.
        values: name -> whatever else they read, or what an object of the user's holds.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.pieces: dict[str, str] = {}
        self.modules: set[str] = set()
        self.constants: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self._stored: set[str] = set()
        self._seen: dict[int, Any] = {}  # with the object, so that no other one gets its number
        self._unread: list[str] = []
        for name, value in roots.items():
            self._add(name, value, 0)
        for name in self._stored & self.constants.keys():
            self.values[name] = self.constants.pop(name)

    def code(self, place: Path, more: Mapping[str, str]) -> Code:
        """Returns all of it as files, to be kept with a run and compared.

        Args:
            place: of the script.
            more: further files, name -> text.
        """
        if self._unread:
            logger.warning(
                "the source of %s is not known (typed at a prompt, or its file was edited since it was loaded), so a "
                "resumed run cannot tell whether it has changed. Define it in a file or a notebook's cell.",
                ", ".join(self._unread[:5]),
            )
        files = {f"{name}.py": text for name, text in self.pieces.items()} | dict(more)
        if self.constants:
            files[_CONSTANTS] = "".join(f"{name} = {value!r}\n" for name, value in sorted(self.constants.items()))
        return Code.of_pieces(place, {name: text.encode() for name, text in sorted(files.items())}, self.modules)

    def _add(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen or depth > _MOST_DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, functools.partial):
            self._add(name, value.func, depth)
            for key, part in (*enumerate(value.args), *value.keywords.items()):
                self._named(f"{name}.{key}", part, depth)
        elif isinstance(value, MethodType):
            self._add(name, value.__func__, depth)
            self._add(name, value.__self__, depth)
        elif isinstance(value, FunctionType):
            self._add_function(name, inspect.unwrap(value), depth)
        elif isinstance(value, type):
            self._add_class(value, depth)
        elif isinstance(value, ModuleType):
            self._is_piece(value.__name__)
        elif isinstance(value, (list, tuple, dict)):
            for key, part in _items(value):
                self._add(f"{name}.{key}", part, depth + 1)
        else:
            self._add_object(name, value, depth)

    def _named(self, name: str, value: Any, depth: int) -> None:
        """A value that a function reads by a name."""
        if _is_constant(value):
            self.constants[name] = value
        elif not isinstance(value, (FunctionType, MethodType, type, ModuleType)):
            self.values[name] = value
        self._add(name, value, depth + 1)

    def _is_piece(self, module: Any) -> bool:
        """Whether what a module has is taken one by one; a module of the user's that has a file is noted."""
        found = sys.modules.get(module) if isinstance(module, str) else None
        file = getattr(found, "__file__", None)
        if module == "__main__" or found is None:
            return True
        if isinstance(file, str) and not is_installed(file):
            self.modules.add(module)
        return False

    def _add_function(self, name: str, function: Any, depth: int) -> None:
        if not isinstance(function, FunctionType):
            return self._add(name, function, depth)
        if self._is_piece(function.__module__):
            self._note(name if "<lambda>" in function.__qualname__ else function.__qualname__, _source(function))
        elif function.__module__ not in self.modules:
            return None  # installed
        return self._add_names(name, function, depth)

    def _add_names(self, name: str, function: FunctionType, depth: int) -> None:
        codes = list(_codes(function.__code__))
        own = self._is_piece(function.__module__)
        if own:
            self._stored |= {
                i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"
            }
        for read in dict.fromkeys(one for code in codes for one in code.co_names):
            if read in function.__globals__:
                value = function.__globals__[read]
                # The constants of a module are in its file.
                if own or not _is_constant(value):
                    self._named(read, value, depth)
        for read, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._named(f"{name}.{read}", cell.cell_contents, depth)
            except ValueError:  # not assigned yet
                continue
        for key, value in (*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()):
            self._add(f"{name}.{key}", value, depth + 1)

    def _add_class(self, kind: type, depth: int) -> None:
        if self._is_piece(kind.__module__):
            self._note(kind.__qualname__, _class_source(kind))
        elif kind.__module__ not in self.modules:
            return
        for name, value in list(vars(kind).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                self._add_names(f"{kind.__qualname__}.{name}", inspect.unwrap(function), depth)
        for base in kind.__bases__:
            self._add(base.__qualname__, base, depth + 1)

    def _add_object(self, name: str, value: Any, depth: int) -> None:
        kind = type(value)
        self._add(kind.__qualname__, kind, depth)
        own = kind.__module__ in self.modules or (kind.__module__ == "__main__")
        parts = value.named_modules() if callable(getattr(value, "named_modules", None)) else [("", value)]
        for path, part in list(parts):
            self._add(type(part).__qualname__, type(part), depth)
            where = f"{name}.{path}".rstrip(".")
            for key, inner in list(getattr(part, "__dict__", {}).items())[:_MOST_ITEMS]:
                if key.startswith("_") and not own:
                    continue
                if own and part is value and isinstance(inner, _PLAIN):
                    self.values[f"{where}.{key}"] = inner
                self._add(f"{where}.{key}", inner, depth + 1)

    def _note(self, name: str, source: str | None) -> None:
        name = name.replace("<locals>.", "").replace("<", "").replace(">", "").replace("/", "_")
        if source is None:
            self._unread.append(name)
            return
        text, free, number = textwrap.dedent(source), name, 1
        while self.pieces.get(free, text) != text:
            number += 1
            free = f"{name}-{number}"
        self.pieces[free] = text


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if len(value) <= _MOST_ITEMS:
        yield from list(value.items()) if isinstance(value, dict) else enumerate(value)


def _is_constant(value: Any) -> bool:
    """Whether it is a plain value that means the same on another machine and at another time."""
    if type(value) is tuple:
        return len(value) <= _MOST_ITEMS and all(_is_constant(part) for part in value)
    if type(value) is str:
        return not any(sign in value for sign in "/\\")
    return type(value) in (bool, type(None)) or (
        type(value) in (int, float) and not _MOMENTS[0] < abs(value) < _MOMENTS[1]
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yields a function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _source(thing: Any) -> str | None:
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError, IndexError, SyntaxError):
        return None
    code = getattr(thing, "__code__", None)
    return text if code is None or code.co_freevars or _is_of(text, [code]) else None


def _is_of(text: str, codes: list[CodeType]) -> bool:
    """Whether a text is the source of code that is loaded: its file may have been edited since."""
    try:
        there = list(_codes(compile(textwrap.dedent(text), "<source>", "exec", dont_inherit=True)))
    except (SyntaxError, ValueError):
        return True  # a lambda's line is not always whole
    return all(any(_alike(code, one) for one in there) for code in codes if not code.co_freevars)


def _alike(code: CodeType, other: CodeType) -> bool:
    return (code.co_name, code.co_names) == (other.co_name, other.co_names) and code.co_code == other.co_code


def _class_source(kind: type) -> str | None:
    """The source of a class; of one in a notebook's cell, which Python cannot find, by that of its methods."""
    functions = [inspect.unwrap(value) for value in vars(kind).values() if isinstance(value, FunctionType)]
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    for code in codes:
        lines = linecache.getlines(code.co_filename)
        try:
            tree = ast.parse("".join(lines))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                first = min((node.lineno, *(one.lineno for one in node.decorator_list)))
                if first <= code.co_firstlineno <= (node.end_lineno or 0):
                    text = "".join(lines[first - 1 : node.end_lineno])
                    return text if _is_of(text, codes) else None
    return _source(kind) if not codes else None
