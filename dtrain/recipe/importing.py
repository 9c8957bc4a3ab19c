"""The user's file or module, imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dtrain.config import bundled as share
from dtrain.config.recipe_file import module_name, syntax_problem
from dtrain.errors import RecipeError, add_remark, nearest
from dtrain.provenance.loading import record_loading

T = TypeVar("T")
_NO_ARGUMENTS = (
    "a recipe has no command line of its own. Make it a parameter of the function that uses it, "
    "build_optimizer(model, lr: float = 0.001), and set it as dtrain train RECIPE.py lr=0.01"
)


def import_module(name: str) -> ModuleType:
    """Imports a recipe that is named as a module.

    Raises:
        RecipeError: there is none of this name, or it has a syntax error.
        Exception: whatever it raises when it is imported.
    """
    if not all(part.isidentifier() for part in name.split(".")) or name == "__main__":
        raise RecipeError(f"recipe {name!r} is neither a .py file nor a module name.")
    _put_on_path(Path.cwd())
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # a package above it is there, but needs something that is not
        found = None
    if found is None:
        file = f"{name}.py"
        hint = f" There is a file {file}: write recipe={file}." if Path(file).is_file() else ""
        near = nearest(name, [config.stem for config in share.folder("configs").glob("*.yaml")])
        raise RecipeError(f"recipe {name}: there is no module and no bundled config of this name.{near}{hint}")
    if found.origin is not None:
        package, _, inner = name.partition(".")
        top = Path(found.origin).resolve()
        # Of an installed recipe its package counts as the user's own; of one of dtrain's, its file alone.
        record_loading(Path(found.origin), top.parents[inner.count(".")] if inner and package != "dtrain" else top)
    return _run_import(lambda: importlib.import_module(name), name)


def import_file(path: Path) -> ModuleType:
    """Imports a recipe's file as `python FILE` would find things: its own folder first on the path; raises as above."""
    _put_on_path(path.parent)
    name = module_name(path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"recipe {path}: cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # DataLoader workers find a dataset's class by this name
    loader = spec.loader
    try:
        _run_import(lambda: loader.exec_module(module), str(path))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _run_import(run: Callable[[], T], name: str) -> T:
    """Imports as a program without arguments; a syntax error or a sys.exit() in it becomes one message."""
    words = list(sys.argv)
    sys.argv[:] = [name]
    try:
        return run()
    except SyntaxError as error:
        raise syntax_problem(error) from None
    except SystemExit as error:
        raise RecipeError(
            f"recipe {name} called sys.exit({error.code!r}) while it was imported. "
            "Put script code under `if __name__ == '__main__':`."
        ) from None
    except Exception as error:
        if "sys.argv" in (traceback.extract_tb(error.__traceback__)[-1].line or ""):
            add_remark(error, _NO_ARGUMENTS)
        raise
    finally:
        sys.argv[:] = words
