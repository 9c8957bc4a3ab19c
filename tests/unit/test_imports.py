"""What is loaded when, and who may import whom.

python tests/unit/test_imports.py    # counts of parts, layers, arrows and circles, and the longest functions
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from helpers.commands import clean_environment

import dtrain
from dtrain import layout

PACKAGE = Path(dtrain.__file__).parent
HEAVY = ("torch", "pandas", "wandb", "accelerate", "sklearn", "numpy")

# The parts of dtrain, lowest first: each imports only what stands in a line above its own, or itself.
LAYERS = [
    ["errors", "version", "files", "masking", "layout", "wording"],
    ["launch", "provenance"],
    ["config"],
    ["rundir"],
    ["distributed"],
    ["data"],
    ["model", "slurm", "report"],
    ["engine"],
    ["checkpoint", "recipe"],
    ["callbacks"],
    ["trainer"],
    ["api"],
    ["tools"],
    ["cli"],
    ["__main__"],
]
BUNDLED = ("dtrain.recipes", "dtrain.templates.")  # what users run and copy
WITHOUT_TORCH = (
    "dtrain.config",
    "dtrain.launch",
    "dtrain.slurm",
    "dtrain.errors",
    "dtrain.version",
    "dtrain.files",
    "dtrain.masking",
    "dtrain.layout",
    "dtrain.wording",
    "dtrain.provenance",
    "dtrain.report",
    "dtrain.rundir.columns",
    "dtrain.rundir.job_record",
    "dtrain.rundir.lock",
    "dtrain.rundir.starts",
    "dtrain.api.here",
    "dtrain.callbacks.progress.events",
    "dtrain.cli.scaffold",
)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not name.startswith(BUNDLED)}


def part_of(module: str) -> str:
    """The package, or the module at the top, that a module belongs to; the top itself is "dtrain"."""
    return (module + ".").split(".")[1] or "dtrain"


def layer_of(part: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if part in layer]
    assert found, f"dtrain.{part} has no layer: give it one in LAYERS"
    return found[0]


def imports_of(path: Path, *, lazy: bool) -> set[str]:
    """Modules that a file imports; with lazy=False only those at its top, when it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows() -> dict[tuple[str, str], set[str]]:
    """(part, part that it imports) -> the modules that do; the lazy exports of `dtrain` itself are left out."""
    known, found = modules(), dict[tuple[str, str], set[str]]()
    for name in known:
        for imported in imports_of(known[name], lazy=True) & set(known):
            pair = part_of(name), part_of(imported)
            if pair[0] != pair[1] and "dtrain" not in pair:
                found.setdefault(pair, set()).add(f"{name} imports {imported}")
    return found


def runs(tree: ast.AST) -> list[ast.AST]:
    """What is run of a module, now or when a function is called: all but what is there for type checkers alone."""
    found = [tree]
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            found += runs(node)
    return found


def circles() -> list[list[str]]:
    """Modules that import each other, directly or through others, at their top or in a function."""
    known = modules()
    graph = {
        name: {
            one if one in known else one.rpartition(".")[0]
            for node in runs(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for one in (f"{node.module}.{alias.name}" for alias in node.names)
        }
        & (known.keys() - {name, "dtrain"})  # whose exports are lazy
        for name, path in known.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [error.args[1]]
    return []


def longest_functions() -> list[tuple[int, str]]:
    """(lines of the body without its docstring, name) of each function, the longest first."""
    found = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                found.append((lines, f"{name}.{node.name}"))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("part", sorted({part_of(name) for name in modules()} - {"dtrain"}))
def test_imports_go_one_way(part: str) -> None:
    for (importer, imported), which in arrows().items():
        if importer == part:
            assert layer_of(imported) < layer_of(part), f"dtrain.{imported} is not below dtrain.{part}: {sorted(which)}"


@pytest.mark.parametrize("name", sorted(n for n in modules() if n.startswith(WITHOUT_TORCH)))
def test_light_modules_never_import_heavy_ones(name: str) -> None:
    roots = {imported.partition(".")[0] for imported in imports_of(modules()[name], lazy=True)}
    assert not roots & set(HEAVY)


@pytest.mark.parametrize(
    "statement", ["import dtrain", "from dtrain.cli import main\ntry: main()\nexcept SystemExit: pass"]
)
def test_help_and_import_load_nothing_heavy(statement: str) -> None:
    code = f"import sys, json; sys.argv = ['dtrain', '--help']\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment(), timeout=120
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert [name for name in loaded if name.partition(".")[0] in HEAVY] == []


def test_every_public_name_loads() -> None:
    for name in dtrain.__all__:
        assert getattr(dtrain, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dtrain.no_such_name


def test_files_stay_small() -> None:
    long = {str(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_names_in_a_runs_folder_stand_in_one_module() -> None:
    names = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    names -= {"slurm", "code", "profile", "tracking", "media"}  # which are words of other kinds, too
    found = {
        f"{name}: {node.value!r}"
        for name, path in modules().items()
        if name not in ("dtrain.layout", "dtrain.cli.scaffold")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == set()


def test_an_error_says_by_its_argument_that_all_ranks_raise_it() -> None:
    """An attribute of another name would be taken for nothing, and each rank would print the error."""
    old = [name for name, path in modules().items() if ".agreed = " in path.read_text()]
    assert old == [], "raise it with on_all_ranks=True"


def test_functions_stay_short() -> None:
    assert [one for one in longest_functions() if one[0] >= 60] == []


def test_no_module_imports_one_that_imports_it() -> None:
    assert circles() == []


def test_every_package_says_what_it_is() -> None:
    packages = [path for path in modules().values() if path.name == "__init__.py"]
    assert [str(path) for path in packages if not ast.get_docstring(ast.parse(path.read_text()))] == []


if __name__ == "__main__":
    up = [pair for pair in arrows() if layer_of(pair[1]) >= layer_of(pair[0])]
    parts = {part_of(name) for name in modules()}
    print(f"{len(parts) - 1} parts, {len(LAYERS)} layers, {len(arrows())} arrows between them, {len(up)} of them up")
    print(f"{len(modules())} modules, {len(circles())} circles of imports between them")
    print("longest functions, in lines of their bodies:")
    for lines, name in longest_functions()[:5]:
        print(f"  {lines:>3}  {name}")
