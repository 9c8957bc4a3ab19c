"""The recipes of docs/gallery: one rank is the plain loop, N ranks are one, and a killed run goes on bitwise.

Short runs in double precision, in which rounding hides nothing. DTRAIN_TEST_SWEEP=full also has three ranks, and kills these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gallery import CASES, checkpoints, copy_double, merged, plain_rows, train_and_die, train_once
from helpers.ranks import run_ranks
from helpers.sweep import FULL, some
from safetensors.torch import load_file

from dtrain.distributed.world import World

HERE = [name for name, case in CASES.items() if not case.missing()]
RANKS = some([2], [3])
# Which are killed on how many ranks: in the fourth step, of three or more an epoch.
KILLED = [(1, name) for name in HERE] + [(ranks, name) for ranks in RANKS for name in (HERE if FULL else ["gan"])]
KILLED_AFTER = 3
ALSO = ["checkpoint.every_steps=1", "checkpoint.asynchronous=false"]  # what is killed has saved each step


def plain_loops(world: World, folder: str, names: list[str]) -> dict[str, Any]:
    """The histories of plain loops."""
    files = Path(folder)
    return {name: plain_rows(files, name, files / "plain", epochs=2, **CASES[name].small) for name in names}


def on_merged_batches(world: World, folder: str, ranks: list[int]) -> dict[str, Any]:
    """The histories of the shards' plain loop, on the batches of several ranks together."""
    files = Path(folder)
    small = {"epochs": 2, **CASES["shards"].small}
    return {str(n): plain_rows(files, "shards", files / "plain", merged(n), **small) for n in ranks}


def recipes(world: World, folder: str, names: list[str], run: str, more: list[str]) -> dict[str, Any]:
    """What recipes come to on these ranks."""
    files = Path(folder)
    return {
        name: train_once(world, files, name, files / run / name, [*CASES[name].small_words(world.size), *more])
        for name in names
    }


def killed(world: World, folder: str, name: str) -> None:
    """One rank of a run that is killed."""
    files, words = Path(folder), [*CASES[name].small_words(world.size), *ALSO]
    train_and_die(world, files, name, files / f"killed-{world.size}" / name, words, KILLED_AFTER)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of them, with as few starts of ranks as can be."""
    folder = tmp_path_factory.mktemp("gallery")
    copy_double(folder)
    start: Callable[..., list[Any]] = functools.partial(run_ranks, folder=str(folder))
    found = {"folder": folder, "plain": start(plain_loops, 1, names=HERE)[0]}
    found["merged"] = start(on_merged_batches, 1, ranks=RANKS)[0]
    for ranks in (1, *RANKS):
        found[ranks] = start(recipes, ranks, names=HERE, run=f"whole-{ranks}", more=[])
    for ranks, name in KILLED:
        start(killed, ranks, ends=-9, name=name)
        found["left", ranks, name] = checkpoints(folder / f"killed-{ranks}" / name)
    for ranks in (1, *RANKS):
        names = [name for number, name in KILLED if number == ranks]
        found["resumed", ranks] = start(recipes, ranks, names=names, run=f"killed-{ranks}", more=ALSO)
    return found


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Each recipe."""
    return needed(request.param)


def needed(name: str) -> str:
    if missing := CASES[name].missing():
        pytest.skip(f"{name} needs {' and '.join(missing)}: pip install '.[gallery]'")
    return name


def same(expected: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Compares rows of histories, in the columns of the first ones; some values are means in single precision."""
    assert len(expected) == len(rows) == 2
    for one, other in zip(expected, rows, strict=True):
        assert {key: other[key] for key in one} == pytest.approx(one, rel=1e-6, abs=1e-7)


def test_one_rank_is_the_plain_loop(runs: dict[str, Any], name: str) -> None:
    same(runs["plain"][name], runs[1][0][name]["rows"])


@pytest.mark.parametrize("ranks", RANKS)
def test_more_ranks_are_one(runs: dict[str, Any], name: str, ranks: int) -> None:
    found = [rank[name] for rank in runs[ranks]]
    assert all(rank["rows"] == found[0]["rows"] for rank in found)
    # The shards' global batches are other ones on another number of ranks.
    one = runs[1][0][name]
    same(runs["merged"][str(ranks)] if name == "shards" else one["rows"], found[0]["rows"])
    if name != "shards":
        assert_close(one["predicted"], found[0]["predicted"])


def assert_close(one: Any, other: Any) -> None:
    """Compares predictions, whatever they are made of."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for parts in zip(one, other, strict=True):
            assert_close(*parts)
    else:
        assert other == (pytest.approx(one, rel=1e-6, abs=1e-6) if isinstance(one, float) else one)


@pytest.mark.parametrize("ranks", [1, *RANKS])
def test_a_run_is_evaluated_and_predicted(runs: dict[str, Any], name: str, ranks: int) -> None:
    for rank in runs[ranks]:
        found = rank[name]
        row = found["rows"][-1]
        validated = {key for key in row if key.startswith("val_")} - {"val_perplexity"}  # after_epoch's own
        assert {f"val_{key}" for key in found["evaluated"]} == validated
        for key, value in found["evaluated"].items():
            assert value == pytest.approx(row[f"val_{key}"], rel=1e-9, abs=1e-9)
        assert found["predicted"] == runs[ranks][0][name]["predicted"]
        assert len(found["predicted"]) > 0


@pytest.mark.parametrize(("ranks", "name"), KILLED)
def test_a_run_that_was_killed_goes_on_bitwise(runs: dict[str, Any], ranks: int, name: str) -> None:
    left = runs["left", ranks, name]
    assert any(one.startswith(("epoch-1-step-", "epoch-2-step-", "epoch-1")) for one in left), left
    assert "epoch-2" not in left
    whole, resumed = (found[0][name] for found in (runs[ranks], runs["resumed", ranks]))
    assert resumed == whole
    one, other = (
        load_file(runs["folder"] / f"{run}-{ranks}" / name / "it/checkpoints/epoch-2/model.safetensors")
        for run in ("whole", "killed")
    )
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
