"""What is loaded when, and who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import clean_environment

import dtrain

PACKAGE = Path(dtrain.__file__).parent
HEAVY = ("torch", "pandas", "wandb", "accelerate", "sklearn", "numpy")

# Lower layers never import higher ones. A module belongs to the longest prefix that names it.
LAYERS = [
    ["dtrain", "dtrain.errors", "dtrain.arguments"],
    [
        "dtrain.share",
        "dtrain.scaffold",
        "dtrain.templates",
        "dtrain.config",
        "dtrain.launch",
        "dtrain.here",
        "dtrain.recipe_file",
        "dtrain.failures",
        "dtrain.seeding",
        "dtrain.deferred",
        "dtrain.fsdp.settings",
        "dtrain.fsdp.tensors",
        "dtrain.events",
        "dtrain.columns",
        "dtrain.memory",
        "dtrain.forwards",
        "dtrain.forks",
        "dtrain.optimizers",
        "dtrain.sources",
        "dtrain.attributes",
        "dtrain.rowwise",
        "dtrain.waiting",
        "dtrain.hooks",
    ],
    ["dtrain.identity", "dtrain.profiles", "dtrain.lock", "dtrain.slurm", "dtrain.starts"],
    ["dtrain.arrival"],
    ["dtrain.world"],
    ["dtrain.precision", "dtrain.compiling", "dtrain.recomputing", "dtrain.import_steps"],
    ["dtrain.spawn", "dtrain.stopping"],
    [
        "dtrain.batch_kinds",
        "dtrain.batch_tree",
        "dtrain.batches",
        "dtrain.collating",
        "dtrain.constants",
        "dtrain.dealing",
        "dtrain.fetching",
        "dtrain.fingerprints",
        "dtrain.samplers",
        "dtrain.streams",
    ],
    [
        "dtrain.synced",
        "dtrain.metrics",
        "dtrain.history",
        "dtrain.workers",
        "dtrain.worker_start",
        "dtrain.loaders",
        "dtrain.sharding",
        "dtrain.ddp",
        "dtrain.ddp_fit",
        "dtrain.drift",
        "dtrain.flat_average",
        "dtrain.gradient_averaging",
        "dtrain.meeting",
        "dtrain.step_guard",
        "dtrain.watched",
        "dtrain.fsdp",
        "dtrain.checks",
        "dtrain.batchnorm",
        "dtrain.draws",
    ],
    [
        "dtrain.steps",
        "dtrain.bounds",
        "dtrain.checkpoint",
        "dtrain.tracking",
        "dtrain.progress",
        "dtrain.signatures",
        "dtrain.clipping",
        "dtrain.averaging",
    ],
    ["dtrain.finite", "dtrain.report"],
    ["dtrain.kinds", "dtrain.untouched"],
    [
        "dtrain.accumulation",
        "dtrain.counting",
        "dtrain.descent",
        "dtrain.learning",
        "dtrain.own_counts",
        "dtrain.passes",
        "dtrain.rates",
        "dtrain.rows",
        "dtrain.switching",
    ],
    ["dtrain.agreed_steps"],
    ["dtrain.validating"],
    ["dtrain.engine", "dtrain.prepared"],
    ["dtrain.parameters", "dtrain.schedules", "dtrain.norms", "dtrain.profiling"],
    ["dtrain.best"],
    ["dtrain.plateau"],
    ["dtrain.inference", "dtrain.training", "dtrain.recipe", "dtrain.export", "dtrain.summary"],
    ["dtrain.building"],
    ["dtrain.resuming"],
    ["dtrain.run_folder"],
    ["dtrain.telling", "dtrain.ending"],
    ["dtrain.keras", "dtrain.fit_forms", "dtrain.run", "dtrain.plan", "dtrain.script"],
    ["dtrain.check", "dtrain.bench", "dtrain.evaluation", "dtrain.doctor", "dtrain.finding", "dtrain.fast_dev"],
    ["dtrain.cli"],
    ["dtrain.__main__"],
]
BUNDLED = ("dtrain.recipes", "dtrain.templates.")  # what users run and copy
WITHOUT_TORCH = (
    "dtrain.config",
    "dtrain.launch",
    "dtrain.slurm",
    "dtrain.here",
    "dtrain.errors",
    "dtrain.events",
    "dtrain.share",
    "dtrain.scaffold",
    "dtrain.recipe_file",
    "dtrain.columns",
    "dtrain.memory",
    "dtrain.starts",
    "dtrain.report",
)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not name.startswith(BUNDLED)}


def layer_of(module: str) -> int:
    ranked = [
        (len(prefix), i)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if (module + ".").startswith(prefix + ".")
    ]
    length, index = max(ranked)
    assert length > len("dtrain") or module == "dtrain", f"{module} has no layer: give it one in LAYERS"
    return index


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


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name: str) -> None:
    known = modules()
    for imported in imports_of(known[name], lazy=True) & set(known):
        if name != "dtrain":  # whose lazy exports name all layers
            assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}, which is above it"


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
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment(), timeout=60
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
