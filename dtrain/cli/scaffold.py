"""What `dtrain init` writes: copies of files that travel with dtrain, one template at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.config import bundled as share
from dtrain.errors import UsageError, nearest
from dtrain.version import PACKAGE

_TRAIN = ("dtrain train", "dtrain train -n 2 --cpu")
_SCRIPT = ("python train.py", "dtrain launch -n 2 --cpu -- train.py")


@dataclass(frozen=True)
class Template:
    """Files to begin with.

    Attributes:
        files: name in the new folder -> the file that it is a copy of.
        commands: what may be run in the new folder, as it is.
        renamed: what is written otherwise in the copies: text -> text.
    """

    files: Mapping[str, Path]
    commands: tuple[str, ...] = _TRAIN
    renamed: Mapping[str, str] | None = None

    def texts(self) -> dict[str, str]:
        """Returns what each file holds, by its name."""
        found = {name: source.read_text(encoding="utf-8") for name, source in self.files.items()}
        for before, after in (self.renamed or {}).items():
            found = {name: text.replace(before, after) for name, text in found.items()}
        return found


def _bundled(name: str) -> Template:
    """A bundled recipe with its config, whose copies belong to each other."""
    files = {"recipe.py": PACKAGE / f"recipes/{name}.py", share.OWN_CONFIG: share.folder("configs") / f"{name}.yaml"}
    renamed = {
        f"dtrain train configs/{name}.yaml": "dtrain train",
        f"recipe: dtrain.recipes.{name}": "recipe: recipe.py",
    }
    return Template(files, renamed=renamed)


def templates() -> dict[str, Template]:
    """Returns the templates by name, the default first."""
    own = PACKAGE / "templates"
    return {
        "function": Template({"recipe.py": own / "function.py", share.OWN_CONFIG: own / "function.yaml"}),
        "script": Template({"train.py": own / "script.py"}, _SCRIPT),
        "keras": Template({"train.py": own / "keras.py"}, _SCRIPT),
        "text": _bundled("text"),
        "tabular": _bundled("diabetes"),
        "image-folder": _bundled("images"),
    }


def named(name: str) -> Template:
    """Returns a template.

    Raises:
        UsageError: there is none of this name.
    """
    known = templates()
    if name not in known:
        raise UsageError(f"--template {name}: no such template.{nearest(name, known)} Valid: {', '.join(known)}.")
    return known[name]


def write(template: Template, folder: Path) -> list[Path]:
    """Writes a template's files into a folder, which is made where it is missing: all of them, or nothing.

    Returns:
        the files.

    Raises:
        UsageError: one is there already, or cannot be written; nothing was changed.
    """
    texts = template.texts()
    there = [str(folder / name) for name in texts if os.path.lexists(folder / name)]
    if there:
        raise UsageError(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} already there; nothing was written. "
            "Use another folder: dtrain init DIR."
        )
    try:
        with _undone_on_error() as done:
            for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
                missing.mkdir()
                done.append(missing)
            for name, text in texts.items():
                with (folder / name).open("x", encoding="utf-8") as file:
                    done.append(folder / name)
                    file.write(text)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; nothing was written. Use another "
            "folder: dtrain init DIR."
        ) from None
    return [folder / name for name in texts]


@contextlib.contextmanager
def _undone_on_error() -> Iterator[list[Path]]:
    """Takes the paths that were made, and removes them where it does not come to an end."""
    done: list[Path] = []
    try:
        yield done
    except BaseException:
        for path in reversed(done):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise
