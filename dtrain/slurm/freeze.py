"""A copy of a recipe's code in the run's folder, so that a queued job runs what was there when it was submitted.

What is copied is what a recipe can import from its own folder: Python files and packages, with the small text files
beside them. Data is not, nor what is installed.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.layout import CODE, JOB, SLURM
from dtrain.provenance.code import project_root

_IMPORTED = (".py", ".so")
_BESIDE = (".cfg", ".ini", ".json", ".pyi", ".toml", ".txt", ".yaml", ".yml")
_SMALL = 1 << 20  # bytes; a larger text file is data
_MOST_BYTES = 50 << 20
_MOST_FILES = 2_000
_MOST_SEEN = 20_000
_SKIPPED = ("__pycache__", "node_modules", "runs", "site-packages", "wandb")


@dataclass(frozen=True)
class Code:
    """The files of a recipe.

    Attributes:
        recipe: the recipe's file.
        files: what belongs to it, relative to its folder.
        size: bytes, in all.
        left: names in that folder that nothing is copied of.
        by_place: of the files, those that find others by their own place (`__file__`).
        below: the folder of the recipe's file in its project; the copy has its files in one of the same name, if some
            find others by their place.
        linked: what a copy has links to, for those: relative to the project, with where it is.
    """

    recipe: Path
    files: tuple[Path, ...]
    size: int
    left: tuple[str, ...]
    by_place: tuple[Path, ...]
    below: Path = Path()
    linked: tuple[tuple[Path, Path], ...] = ()

    @property
    def name(self) -> str:
        """Where the recipe's file is in a copy."""
        return str(self.below / self.recipe.name)

    def copy_to(self, folder: Path) -> Path:
        """Copies all files.

        Returns:
            the copy of the recipe.

        Raises:
            UsageError: a file cannot be read or written.
        """
        try:
            for file in self.files:
                copy = folder / self.below / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.recipe.parent / file, copy)
            for link, target in self.linked:
                if not folder.resolve().is_relative_to(target.resolve()):  # the folder of runs, a link to itself
                    (folder / link).symlink_to(target)
        except OSError as error:
            raise UsageError(f"--freeze: {error.filename}: cannot be copied to {folder}: {error.strerror}.") from None
        return folder / self.name

    def is_in(self, folder: Path) -> bool:
        """Whether these are the files of a copy itself."""
        return self.recipe.is_relative_to(folder.resolve())

    def told(self) -> str:
        """Returns in words what is copied and what is not."""
        size = f"{self.size / 1e6:.1f} MB" if self.size >= 1e6 else f"{-(-self.size // 1000)} kB"
        lines = [f"copied: {_number(self.files, 'file')}, {size}, of {self.recipe.parent}"]
        if self.left:
            shown = ", ".join(self.left[:8]) + (", ..." if len(self.left) > 8 else "")
            lines.append(f"not copied: {shown}; installed packages and files in other folders")
        if self.by_place:
            lines.append(
                f"note: {', '.join(map(str, self.by_place[:4]))} may look up files by "
                "__file__: files that are not copied "
                "are linked next to the copy, and read as they are when the job runs."
            )
        return "\n".join(lines)


def find_code(recipe: Path) -> Code:
    """Finds what a recipe can import from its own folder; nothing is imported or copied.

    Raises:
        UsageError: it is too much for a copy, or cannot be read.
    """
    recipe = recipe.resolve()
    folder = recipe.parent
    try:
        kept = tuple(dict.fromkeys((Path(recipe.name), *_Walk().files(folder, Path()))))
        sizes = {file: (folder / file).stat().st_size for file in kept}
        by_place = tuple(file for file in kept if file.suffix == ".py" and b"__file__" in (folder / file).read_bytes())
        there = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(f"--freeze: {error.filename}: cannot be read: {error.strerror}.") from None
    _check_size(sizes, folder)
    taken = {file.parts[0] for file in kept}
    left = tuple(name for name in there if name not in taken and name != "__pycache__")
    copy = next((one for one in recipe.parents if one.name == CODE and (one.parent / JOB).exists()), None)
    if copy is not None:  # the recipe is itself in a copy, of a run that is submitted again
        return Code(recipe, kept, sum(sizes.values()), left, by_place, recipe.parent.relative_to(copy))
    below, linked = _links(recipe, left) if by_place else (Path(), ())
    return Code(recipe, kept, sum(sizes.values()), left, by_place, below, linked)


def _links(recipe: Path, left: tuple[str, ...]) -> tuple[Path, tuple[tuple[Path, Path], ...]]:
    """Returns where a recipe is in its project, and what is beside it and the folders above it there."""
    root = project_root(recipe)
    below = recipe.parent.relative_to(root)
    found = [(below / name, recipe.parent / name) for name in left]
    for folder in (recipe.parent, *recipe.parent.parents):
        if folder == root:
            break
        names = sorted(entry.name for entry in os.scandir(folder.parent) if not entry.name.startswith("."))
        above = below.parents[len(recipe.parent.parts) - len(folder.parts)]
        found += [(above / name, folder.parent / name) for name in names if name != folder.name]
    return below, tuple((link, target) for link, target in found if link.name not in _SKIPPED)


class _Walk:
    """Goes through the folders that hold code, each once, however it is linked."""

    def __init__(self) -> None:
        self._folders: set[str] = set()
        self._seen = 0

    def files(self, top: Path, below: Path) -> Iterator[Path]:
        real = os.path.realpath(top / below)
        if real in self._folders:
            return
        self._folders.add(real)
        entries = sorted(os.scandir(top / below), key=lambda entry: entry.name)
        self._seen += len(entries)
        if self._seen > _MOST_SEEN:
            raise UsageError(
                f"--freeze: {top} contains more than {_MOST_SEEN:,} other files besides the code. Move the recipe "
                "and its imports to a separate folder, or use --no-freeze."
            )
        yield from (below / entry.name for entry in entries if entry.is_file() and _belongs(entry))
        for entry in entries:
            if entry.is_dir() and _holds_code(entry):
                yield from self.files(top, below / entry.name)


def _belongs(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    if entry.name.endswith(_IMPORTED):
        return True
    return entry.name.endswith(_BESIDE) and entry.stat().st_size <= _SMALL


def _holds_code(folder: os.DirEntry[str]) -> bool:
    """Whether a folder is a package, with or without an __init__.py; what it holds decides, and data may be a lot."""
    # A name with a dot in it cannot be imported, nor is a hidden one.
    if "." in folder.name or folder.name in _SKIPPED or (Path(folder.path) / "pyvenv.cfg").exists():
        return False
    if (Path(folder.path) / SLURM / JOB).exists():  # a run's, with a copy of its own
        return False
    with os.scandir(folder.path) as entries:
        return any(entry.name.endswith(_IMPORTED) for entry in itertools.islice(entries, _MOST_SEEN))


def _check_size(sizes: dict[Path, int], folder: Path) -> None:
    if len(sizes) <= _MOST_FILES and sum(sizes.values()) <= _MOST_BYTES:
        return
    largest = max(sizes, key=lambda file: sizes[file])
    raise UsageError(
        f"--freeze: the code in {folder} is {len(sizes):,} files and {sum(sizes.values()) / 1e6:.0f} MB, the largest "
        f"{largest} with {sizes[largest] / 1e6:.1f} MB; at most {_MOST_FILES:,} files and {_MOST_BYTES / 1e6:.0f} MB "
        "are copied. Move the recipe and its imports to a separate folder, or use --no-freeze."
    )


def _number(things: tuple[Path, ...], word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"
