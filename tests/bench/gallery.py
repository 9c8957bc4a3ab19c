"""What the recipes of docs/gallery reach, as they are: the plain loop, one rank and more; writes docs/gallery/results.json.

`python tests/bench/gallery.py [NAME ...] [--ranks 1,2,3]`, then `python docs/make.py`. It takes minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.gallery import CASES, GALLERY, plain_rows, train_once
from helpers.ranks import run_ranks

RESULTS = GALLERY / "results.json"


def plain(world: Any, name: str, folder: str) -> dict[str, Any]:
    """The plain loop's last row."""
    return plain_rows(GALLERY, name, Path(folder) / "plain")[-1]


def recipe(world: Any, name: str, folder: str) -> dict[str, Any]:
    """The last row of the recipe on these ranks, as its page's command trains it."""
    where = Path(folder) / str(world.size)
    return train_once(world, GALLERY, name, where, CASES[name].full_words(world.size, folder))["rows"][-1]


def main(words: list[str]) -> None:
    """Runs what is named, and puts it into the file."""
    ranks = [int(n) for n in words.pop(words.index("--ranks") + 1).split(",")] if "--ranks" in words else [1, 2, 3]
    names = [word for word in words if not word.startswith("--")] or list(CASES)
    for name in names:
        if missing := CASES[name].missing():
            print(f"{name} needs {', '.join(missing)}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = {"plain": run_ranks(plain, 1, timeout=3600, name=name, folder=folder)[0]}
            for size in ranks:
                rows[str(size)] = run_ranks(recipe, size, timeout=3600, name=name, folder=folder)[0]
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept = {key: value for key, value in rows["plain"].items() if key != "epoch"}
        found[name] = {run: {key: float(f"{row[key]:.6g}") for key in kept} for run, row in rows.items()}
        RESULTS.write_text(json.dumps({name: found[name] for name in CASES if name in found}, indent=2) + "\n")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
