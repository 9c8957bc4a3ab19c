"""What can be said of a recipe's file without importing it, and so without torch."""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

from dtrain.errors import RecipeError, nearest
from dtrain.layout import CONFIG
from dtrain.version import RECIPES

_MOST_LISTED = 5  # files that a message names
UNIMPORTABLE = "dtrain_recipe_"  # begins the module's name where the file's own name cannot be imported


def locate(reference: str, base: Path) -> Path | None:
    """Finds the file of a recipe.

    Args:
        reference: a .py file (relative to `base`, else to the current folder) or a dotted module name.
        base: folder of the config that names the recipe.

    Returns:
        the file, or None for a dotted name, which is left to the import system.

    Raises:
        RecipeError: a file is named that is not there, or something else than a .py file.
    """
    _refuse_other_kinds(reference, base)
    if not reference.endswith(".py") and "/" not in reference:
        return None
    for folder in (base, Path()):
        path = folder / reference
        if path.is_file():
            return path
    folder = (base / reference).parent
    there = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    if Path(reference).is_absolute():  # as a run's config has it: another name is no likely mistake
        name = Path(reference).name
        moved = next((path for path in (Path(name), *sorted(Path().glob(f"*/{name}"))) if path.is_file()), None)
        raise RecipeError(f"recipe {reference}: no such file.{'' if moved is None else f' There is {moved}.'}")
    near = nearest(Path(reference).name, there)
    listed = f" Python files there: {', '.join(there[:_MOST_LISTED])}." if there and not near else ""
    raise RecipeError(f"recipe {reference}: no such file (looked in {folder.resolve()}).{near or listed}")


WHERE_NOW = " If it was moved, say where it is now: recipe=NEWPATH."


def module_name(stem: str) -> str:
    """Returns the name of a recipe's module: its file's own, by which a DataLoader's worker can import it, too.

    Unless another module has it, or it has a dot, for Python the end of a package's name.
    """
    taken = stem in sys.modules or stem in sys.stdlib_module_names or "." in stem
    return f"{UNIMPORTABLE}{stem}" if taken else stem


def _refuse_other_kinds(reference: str, base: Path) -> None:
    """Refuses a notebook, a folder that is no package, and files of other endings."""
    path = next((folder / reference for folder in (base, Path()) if (folder / reference).exists()), None)
    if reference.endswith(".ipynb"):
        script = str(Path(reference).with_suffix(".py"))
        raise RecipeError(
            f"{reference} is a notebook: `{shlex.join(['jupyter', 'nbconvert', '--to', 'script', reference])}`, then "
            f"`{shlex.join(['dtrain', 'train', script])}`."
        )
    if path is None or (reference.endswith(".py") and path.is_file()):
        return
    if path.is_file():
        raise RecipeError(
            f"recipe {reference} is not a .py file. A recipe is a .py file or a module; a config ends in .yaml."
        )
    if not path.is_dir() or ("/" not in reference and (path / "__init__.py").is_file()):
        return
    if (path / CONFIG).is_file():
        remedy = (
            f"It is a run's folder: dtrain evaluate {shlex.quote(reference)}; to train it again, name its config.yaml."
        )
    else:
        there = sorted(p.name for p in path.iterdir() if p.suffix in (".py", ".yaml", ".yml"))
        remedy = "Name a .py file or a .yaml config" + (f" in it: {', '.join(there[:5])}." if there else ".")
    raise RecipeError(f"recipe {reference} is a folder. {remedy}")


def title_of(reference: str) -> str:
    """Returns the short name of a recipe, after which its runs are named."""
    return Path(reference).stem if reference.endswith(".py") else reference.rpartition(".")[2]


def bundled(reference: str) -> Path | None:
    """Returns the file of a recipe that comes with dtrain, such as `dtrain.recipes.digits`; None for any other."""
    package, _, name = reference.rpartition(".")
    path = RECIPES / f"{name}.py"
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
        content = path.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise RecipeError(f"{path}: the file is in UTF-16. Save it as UTF-8, as Python reads it.")
        if b"\0" in content:
            line = content[: content.index(b"\0")].count(b"\n") + 1
            raise RecipeError(f"{path}:{line}: the file contains a NUL byte. Is it damaged?")
        ast.parse(content, filename=str(path))
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


def secrets_in(path: Path) -> list[str]:
    """Returns the keys that a recipe marks as secret by `secrets = ["data.dsn"]`; the file is not run.

    Raises:
        RecipeError: that is no list of dotted keys.
    """
    try:
        body = ast.parse(path.read_bytes(), filename=str(path)).body
    except (OSError, ValueError, SyntaxError):
        return []  # whoever imports it is told
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "secrets" for target in targets):
                return _keys_of(node.value, path)
    return []


def _keys_of(node: ast.expr, path: Path) -> list[str]:
    try:
        found = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return []  # some other thing of this name
    if not isinstance(found, list | tuple) or not all(isinstance(key, str) and "." in key for key in found):
        raise RecipeError(
            f"{path}:{node.lineno}: secrets = {found!r}: should be a list of keys of the config whose values are "
            'masked, such as ["data.dsn"].'
        )
    return list(found)
