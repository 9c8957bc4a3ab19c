"""What can be said of a recipe's file without importing it, and so without torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection
from pathlib import Path

from dtrain.errors import RecipeError, nearest

UNIMPORTABLE = "dtrain_recipe_"  # begins the module's name where the file's own name cannot be imported


def locate(reference: str, base: Path) -> Path | None:
    """Finds the file of a recipe.

    Args:
        reference: a .py file (relative to `base`, else to the current folder) or a dotted module name.
        base: folder of the config that names the recipe.

    Returns:
        the file, or None for a dotted name, which is left to the import system.

    Raises:
        RecipeError: a file is named that is not there.
    """
    if not reference.endswith(".py") and "/" not in reference:
        return None
    for folder in (base, Path()):
        path = folder / reference
        if path.is_file():
            return path
    folder = (base / reference).parent
    there = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    raise RecipeError(
        f"recipe {reference}: no such file (looked in {folder.resolve()}).{nearest(Path(reference).name, there)}"
    )


def module_name(stem: str) -> str:
    """Returns the name of a recipe's module: its file's own, by which a DataLoader's worker can import it, too.

    Unless another module has it, or it has a dot, for Python the end of a package's name.
    """
    taken = stem in sys.modules or stem in sys.stdlib_module_names or "." in stem
    return f"{UNIMPORTABLE}{stem}" if taken else stem


def title_of(reference: str) -> str:
    """Returns the short name of a recipe, after which its runs are named."""
    return Path(reference).stem if reference.endswith(".py") else reference.rpartition(".")[2]


def bundled(reference: str) -> Path | None:
    """Returns the file of a recipe that comes with dtrain, such as `dtrain.recipes.digits`; None for any other."""
    package, _, name = reference.rpartition(".")
    path = Path(__file__).parent / "recipes" / f"{name}.py"
    return path if package == "dtrain.recipes" and path.is_file() else None


def parameters_in(path: Path, functions: Collection[str]) -> set[str]:
    """Returns the names of the parameters of some of a file's functions; none where it cannot be read.

    Args:
        path: a recipe, which is not run.
        functions: names of functions at the file's top.
    """
    try:
        body = ast.parse(path.read_bytes(), filename=str(path)).body
    except (OSError, ValueError, SyntaxError):
        return set()
    found = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name in functions]
    return {one.arg for arguments in found for one in (*arguments.args, *arguments.kwonlyargs)}


def check_syntax(path: Path) -> None:
    """Parses a recipe.

    Raises:
        RecipeError: it is no Python; the message has file, line and the text there.
    """
    try:
        ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise syntax_problem(error) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error}.") from None


def syntax_problem(error: SyntaxError) -> RecipeError:
    """Returns a syntax error as one message with file, line and the text there."""
    text = (error.text or "").strip()
    return RecipeError(
        f"{error.filename}:{error.lineno}: syntax error: {error.msg}" + (f"\n    {text}" if text else "")
    )
