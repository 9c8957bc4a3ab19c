"""The sources that belong to one recipe: its own file, and what it imported of the user's own."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.provenance.loading import Source, is_installed, loaded_since, loadings, newest_of
from dtrain.provenance.trees import imports_in_functions

_ROOT_SIGNS = (".git", "pyproject.toml", "setup.py", "setup.cfg")
_GENERATED = ("torchinductor_", "__pycache__")
_DIGITS = 32


def content_hash(content: bytes) -> str:
    """Returns the first 32 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


@dataclass
class Code:
    """What a recipe consists of, as this process loaded it.

    Attributes:
        recipe: the recipe's file, which may be gone by now.
        name: the recipe's name among the files.
        files: name -> content. A name follows the module's name and not its place, so that a project that was moved,
            or a copy of it, has the same ones: `nets/deep.py` for `nets.deep`.
        places: name -> where it was loaded from.
        values: what the functions of a call without a recipe read besides, by name.
        noted: the run's folder, and what a checkpoint of it says of the code as it is; None where that is not known.
    """

    recipe: Path
    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)
    noted: tuple[Path | None, dict[str, Any]] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    _seen: int = 0

    @classmethod
    def of(cls, module: ModuleType, name: str, since: int) -> Code:
        """Returns the code of an imported recipe.

        Args:
            module: the recipe.
            name: of its file.
            since: how many files were loaded before it was imported.
        """
        file = Path(module.__file__ or name).resolve()
        code = cls(file, name, _seen=since)
        code._add(newest_of(file) or _read(file, module.__name__), name)
        code.update()
        for found, path in _reached(module):  # those imported for something else before were not loaded since
            if path not in code.places.values():
                code._add(newest_of(path) or _read(path, found))
        code._add_later_ones()
        return code

    @classmethod
    def of_pieces(
        cls, place: Path, pieces: Mapping[str, bytes], modules: Iterable[str], main: ModuleType | None = None
    ) -> Code:
        """Returns the code of a call that has no recipe.

        Args:
            place: of the script that calls.
            pieces: name -> content.
            modules: names of modules of the user's own that belong to it, with those that they lead to.
            main: the script, where all that it leads to belongs to it.
        """
        code = cls(place, next(iter(pieces), place.name), dict(pieces), _seen=loadings())
        for name in sorted({*modules, *(name for name, _ in (() if main is None else _reached(main)))}):
            module = sys.modules[name]
            for found, path in ((name, Path(str(module.__file__)).resolve()), *_reached(module)):
                if path.suffix == ".py" and path not in code.places.values() and found != "__main__":
                    code._add(newest_of(path) or _read(path, found))
        code._add_later_ones()
        return code

    def update(self) -> bool:
        """Adds what was loaded since; cheap where nothing was.

        Returns:
            whether there was something.
        """
        if loadings() == self._seen:
            return False
        before, roots = dict(self.files), self.roots()
        for source in loaded_since(self._seen):
            if _is_own(source, roots):
                self._add(source)
        self._seen = loadings()
        return self.files != before

    def hashes(self) -> dict[str, str]:
        """Returns the hash of each file by name."""
        return {name: content_hash(content) for name, content in sorted(self.files.items())}

    def _add(self, source: Source | None, name: str | None = None) -> None:
        if source is None:
            return
        known = next((known for known, path in self.places.items() if path == source.path), None)
        name = known or name or _free(_name_of(source), self.files)
        self.files[name], self.places[name] = source.content, source.path

    def _add_later_ones(self) -> None:
        """Adds what functions import, as it is now: a dataset's may do so in a worker, which nobody here sees."""
        left = dict(self.files)
        while left:
            name, content = left.popitem()
            for module in sorted(imports_in_functions(content, name)):
                for file in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
                    path = next((root / file for root in self.roots() if (root / file).is_file()), None)
                    source = None if path is None or is_installed(str(path)) else _read(path.resolve(), module)
                    if source is not None and source.path not in self.places.values():
                        self._add(source)
                        left[file] = source.content

    def roots(self) -> list[Path]:
        """Returns the folders that the project's files are below, those of `sys.path` first, in its order."""
        return [*(Path(entry).resolve() for entry in sys.path), self.recipe.parent, project_root(self.recipe)]


def project_root(recipe: Path) -> Path:
    """Returns the nearest folder above a recipe that is a project's, by the files in it; else the recipe's own."""
    found = (folder for folder in recipe.parents if any((folder / sign).exists() for sign in _ROOT_SIGNS))
    return next(found, recipe.parent)


def _is_own(source: Source, roots: Iterable[Path]) -> bool:
    """Whether a file is what somebody wrote: where a project or an import path is, or named as its module is.

    The others are caches of compiled kernels and the like, whose names and contents differ from run to run.
    """
    path = source.path
    return tuple(source.module.split(".")) == path.with_suffix("").parts[-source.module.count(".") - 1 :] or any(
        path.is_relative_to(root) and not is_generated(path.relative_to(root)) for root in roots
    )


def is_generated(below: Path) -> bool:
    """Whether a file lies in a cache, by the names of the folders above it."""
    return any(part.startswith((".", *_GENERATED)) for part in below.parts)


def _name_of(source: Source) -> str:
    parts = source.module.split(".")
    if not all(part.isidentifier() for part in parts):
        return source.path.name
    suffix = ".pyc" if source.path.suffix == ".pyc" else ".py"
    return "/".join(parts) + ("/__init__" if source.path.stem == "__init__" else "") + suffix


def _free(name: str, taken: Mapping[str, Any]) -> str:
    (stem, dot, suffix), number, free = name.rpartition("."), 1, name
    while free in taken:
        number += 1
        free = f"{stem}-{number}{dot}{suffix}"
    return free


def _read(path: Path, module: str) -> Source | None:
    """A file that was loaded before loading was recorded, as it is now."""
    try:
        return Source(path, module, path.read_bytes())
    except OSError:
        return None


def _reached(module: ModuleType) -> Iterator[tuple[str, Path]]:
    """Yields the modules, with their files, that a module's names lead to: modules, and functions and classes."""
    seen, left = {module.__name__}, [module]
    names = set(_with_packages(module.__name__)) - seen
    while left or names:
        for value in list(vars(left.pop()).values()) if left else ():
            name = value.__name__ if type(value) is ModuleType else _module_of(value)
            names |= set(_with_packages(name)) if isinstance(name, str) else set()
        for name in names - seen:
            found = sys.modules.get(name)
            file = getattr(found, "__file__", None)
            if found is not None and isinstance(file, str) and file.endswith(".py") and not is_installed(file):
                left.append(found)
                yield name, Path(file).resolve()
        seen |= names
        names = set()


def _with_packages(name: str) -> list[str]:
    """Returns a module's name and those of the packages that it is in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _module_of(value: Any) -> Any:
    try:
        return value.__module__
    except Exception:  # noqa: BLE001 - an object of the user's that answers for its attributes itself
        return None
