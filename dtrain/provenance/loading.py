"""Records the bytes that Python compiles when a module of the user's own is imported.

A file that is read again later may have been edited since, and a `.pyc` is taken for current where an edit left size
and second as they were. So the modules of a recipe's project are always compiled from their source, and what was
compiled is remembered. Of a library elsewhere that is installed as it is edited, the `.pyc` is used, for its speed.
Of a module in a zip archive its source is remembered, where it has one; else, and of a `.pyc` without a source, what
Python runs. What is installed (the standard library, site-packages, dtrain itself) is loaded as ever.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import CodeType
from typing import Any
from zipimport import zipimporter

from dtrain.version import PACKAGE

_PYC_HEADER = 16  # bytes (PEP 552)
INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Source:
    """One file as it was loaded.

    Attributes:
        path: the file, resolved; of a module in an archive, below that.
        module: the name that it was imported by.
        content: the bytes that were compiled.
    """

    path: Path
    module: str
    content: bytes


_loaded: list[Source] = []  # in the order of loading; a module that is loaded again is there twice
_projects: set[str] = set()
_watched: set[str] = set()  # installed files and folders that count as the user's own all the same


def loaded_since(number: int) -> list[Source]:
    """Returns what was loaded after so many loadings."""
    return _loaded[number:]


def loadings() -> int:
    """Returns how many files were loaded so far."""
    return len(_loaded)


def record_loading(*watched: Path, project: Path | None = None) -> None:
    """From now on, what is loaded is recorded, in this process.

    Args:
        watched: installed files or folders that are recorded, too: a recipe that is a module.
        project: a folder whose files are always compiled from their source.
    """
    _watched.update(str(path) for path in watched)
    if project is not None:
        _projects.add(str(project))
    # Of the class and not by a finder of our own, so that a file is seen which user code loads by its path
    # (spec_from_file_location), and so that loaders which derive from it (beartype's, say) still transform the code.
    if SourceFileLoader.get_code is not _get_code:
        SourceFileLoader.get_code = _get_code  # type: ignore[method-assign, assignment]
        without_source: tuple[Any, ...] = (SourcelessFileLoader, zipimporter)
        for kind in without_source:
            kind.get_code = _recording(kind.get_code)


def record_executed(path: Path, below: Path) -> None:
    """Records a file that is executed under its own name without being imported, as by `runpy`.

    Args:
        path: the file.
        below: the same, below the project's folder, by which it is named.
    """
    if not path.is_file():
        return
    file, content = path.resolve(), path.read_bytes()
    newest = newest_of(file)
    if newest is None or newest.content != content:
        module = ".".join(below.with_suffix("").parts) if below.suffix == ".py" else below.name
        _loaded.append(Source(file, module, content))


def newest_of(path: Path) -> Source | None:
    """Returns a file as it was last loaded; None where that was not recorded."""
    return next((source for source in reversed(_loaded) if source.path == path), None)


_plain_get_code: Any = SourceFileLoader.get_code


def _get_code(loader: SourceFileLoader, fullname: str) -> CodeType | None:
    path = loader.get_filename(fullname)
    if is_installed(path):
        return _plain_get_code(loader, fullname)  # type: ignore[no-any-return]
    content = loader.get_data(path)
    file = Path(path).resolve()
    _loaded.append(Source(file, fullname, content))
    if any(str(file).startswith(f"{project}/") for project in _projects):
        return loader.source_to_code(content, path)
    return _plain_get_code(loader, fullname)  # type: ignore[no-any-return]


def _recording(get_code: Callable[[Any, str], CodeType | None]) -> Callable[[Any, str], CodeType | None]:
    """Returns the `get_code` of a loader whose modules need not have a source file, which records what it returns."""

    def recorded(loader: Any, fullname: str) -> CodeType | None:
        code = get_code(loader, fullname)
        path = loader.get_filename(fullname)
        if code is not None and not is_installed(path):
            _loaded.append(Source(Path(path).resolve(), fullname, without_header(path, loader.get_data(path))))
        return code

    return recorded


def without_header(path: str, data: bytes) -> bytes:
    """Returns a file's data; of a .pyc without what says when its source was changed."""
    return data[_PYC_HEADER:] if path.endswith(".pyc") else data


def is_installed(path: str) -> bool:
    """Whether a file is no part of what the user writes: installed, Python's, or dtrain's."""
    if any(path == top or path.startswith(f"{top}/") for top in _watched):
        return False
    if path.startswith(f"{PACKAGE}/"):
        return True
    parts = path.split("/")
    return any(name in parts for name in INSTALLED) or path.startswith(_standard_library())


@functools.cache
def _standard_library() -> tuple[str, ...]:
    return tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
