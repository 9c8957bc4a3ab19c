"""The recipes of docs/gallery: one rank computes what the plain loop does, N ranks what one does, a killed run goes on bitwise.

Short runs in double precision, in which rounding hides nothing; DTRAIN_TEST_SWEEP=full also runs the files as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gallery import CASES, GALLERY, checkpoints, copy_double, plain_rows, train_and_die, train_once
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from dtrain.distributed.world import World

HERE = [name for name, case in CASES.items() if not case.missing()]
each = pytest.mark.parametrize("name", CASES)
ONCE = 5  # steps of an epoch are at least as many; a run dies two steps before the end of its second one


def plain_loops(world: World, folder: str, names: list[str]) -> dict[str, Any]:
    """The histories of plain loops."""
    files = Path(folder)
    return {name: plain_rows(files, name, files / "plain", epochs=2, **CASES[name].small) for name in names}


def recipes(world: World, folder: str, names: list[str], run: str) -> dict[str, Any]:
    """What recipes come to on this world."""
    files = Path(folder)
    return {
        name: train_once(world, files, name, files / run / name, words_of(name, world.size)) for name in names
    }


def words_of(name: str, ranks: int) -> list[str]:
    return [*CASES[name].small_words(ranks), "checkpoint.every_steps=1", "checkpoint.asynchronous=false"]


def killed(world: World, folder: str, name: str, steps: int) -> None:
    files = Path(folder)
    train_and_die(world, files, name, files / "killed" / name, words_of(name, world.size), steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of them, with as few starts of ranks as can be."""
    folder = tmp_path_factory.mktemp("gallery")
    copy_double(folder)
    start: Callable[..., list[Any]] = functools.partial(run_ranks, folder=str(folder))
    found = {"folder": folder, "plain": start(plain_loops, 1, names=HERE)[0]}
    for ranks in (1, 2):
        found[ranks] = start(recipes, ranks, names=HERE, run=f"whole-{ranks}")
    for name in HERE:
        start(killed, 2, ends=-9, name=name, steps=ONCE + 3)
    found["left"] = {name: checkpoints(folder / "killed" / name) for name in HERE}
    found["resumed"] = start(recipes, 2, names=HERE, run="killed")
    return found


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Each recipe."""
    if missing := CASES[request.param].missing():
        pytest.skip(f"{request.param} needs {' and '.join(missing)}: pip install '.[gallery]'")
    return request.param


def same(one: dict[str, Any], other: dict[str, Any], close: float = 1e-6) -> None:
    """Compares two rows of histories, in the columns of the first."""
    assert {key: other[key] for key in one} == pytest.approx(one, rel=close, abs=close)


def test_one_rank_is_the_plain_loop(runs: dict[str, Any], name: str) -> None:
    plain, rows = runs["plain"][name], runs[1][0][name]["rows"]
    assert len(plain) == len(rows) == 2
    for expected, row in zip(plain, rows, strict=True):
        same(expected, row)
