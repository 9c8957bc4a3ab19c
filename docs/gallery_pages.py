"""Makes the gallery's pages from its recipes: their code, their lines, and what tests/bench/gallery.py has measured."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

GALLERY = Path(__file__).parent / "gallery"
RESULTS = "results.json"
TABLE, CODE, END = (
    "<!-- table: made by `python docs/make.py` -->",
    "<!-- code: made by `python docs/make.py` -->",
    "<!-- end -->",
)
# In the order of the table: the column that says what is reached.
METRICS = {
    "language_model": "val_accuracy",
    "lora": "val_loss",
    "images": "val_accuracy",
    "gan": "val_frechet",
    "contrastive": "val_nearest",
    "tagging": "val_f1",
    "stream": "val_loss",
    "shards": "val_accuracy",
    "distillation": "val_accuracy",
    "multitask": "val_digits_accuracy",
    "detection": "val_ap",
    "callbacks": "val_kappa",
}


def pages() -> dict[Path, str]:
    """Returns each page of the gallery as it should be."""
    found = {GALLERY / "index.md": _between(GALLERY / "index.md", TABLE, _table())}
    return found | {GALLERY / f"{name}.md": _between(GALLERY / f"{name}.md", CODE, _code(name)) for name in METRICS}


def lines_of(path: Path) -> int:
    """Returns the lines of a file that are not blank."""
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _between(page: Path, begin: str, made: str) -> str:
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    return f"{head}{begin}\n\n{made}\n{END}{rest.partition(END)[2]}"


def _table() -> str:
    results = json.loads((GALLERY / RESULTS).read_text(encoding="utf-8"))
    heads = ["recipe", "what it shows", "lines, plain", "lines, recipe"]
    heads += ["value", "plain", "1 rank", "2 ranks"] if results else []
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, metric in METRICS.items():
        file = GALLERY / f"{name}.py"
        shared = GALLERY / f"{name}_data.py"
        more = f" + {lines_of(shared)}" if shared.exists() else ""
        counted = [f"{lines_of(path)}{more}" for path in (file.with_name(f"{name}_plain.py"), file)]
        reached = [_number(results.get(name, {}).get(run), metric) for run in ("plain", "1", "2")]
        cells = [f"[{name}]({name}.md)", _words(file), *counted, *([f"`{metric}`", *reached] if results else [])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _number(row: dict[str, Any] | None, metric: str) -> str:
    return "" if row is None else f"{row[metric]:.3f}"


def _words(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").rstrip(".")


def _code(name: str) -> str:
    files = [path for path in (GALLERY / f"{name}.py", GALLERY / f"{name}_data.py") if path.exists()]
    parts = [_fenced(path) for path in files]
    plain = GALLERY / f"{name}_plain.py"
    counted = f"`{name}.py` has {lines_of(files[0])} lines, the plain loop {lines_of(plain)}, blank ones not counted."
    return "\n".join([*parts, counted, "", "## The plain loop", "", _fenced(plain, marked=False)])


def _fenced(path: Path, *, marked: bool = True) -> str:
    mark = f"<!-- file: {path.name} -->\n" if marked else ""
    return f"`{path.name}`:\n\n{mark}```python\n{path.read_text(encoding='utf-8')}```\n"
