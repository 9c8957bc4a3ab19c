"""The recipes of docs/gallery: one rank is the plain loop, N ranks are one, and a killed run goes on bitwise.

Short runs in double precision, in which rounding hides nothing. DTRAIN_TEST_SWEEP=full also has three ranks, and kills these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gallery import CASES, checkpoints, copy_double, merged, plain_rows, train_and_die, train_once
from helpers.ranks import run_ranks
from helpers.sweep import FULL, some
from safetensors.torch import load_file

from dtrain.distributed.world import World

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all runs
PATIENCE = 900.0
HERE = [name for name, case in CASES.items() if not case.missing()]
RANKS = some([2], [3])
# On how many ranks each is killed: as it begins its fifth step, of three or more an epoch; so most within the second.
KILLED = [(ranks, name) for ranks in (1, *RANKS) for name in HERE if FULL or (ranks == 1) != (name == "gan")]
KILLED_AFTER = 4
ALSO = ["checkpoint.every_steps=1", "checkpoint.asynchronous=false"]  # what is killed has saved each step


def killed(world: World, folder: str, name: str) -> None:
    """One rank of a run that is killed."""
    files, words = Path(folder), [*CASES[name].small_words(world.size), *ALSO]
    train_and_die(world, files, name, files / f"killed-{world.size}" / name, words, KILLED_AFTER)


def recipes(world: World, folder: str, resumed: list[str]) -> dict[str, Any]:
    """What all recipes come to on these ranks, and those that were killed."""
    files, found = Path(folder), {}
    for run, names, more in (("whole", HERE, []), ("killed", resumed, ALSO)):
        for name in names:
            words = [*CASES[name].small_words(world.size), *more]
            found[f"{run} {name}"] = train_once(world, files, name, files / f"{run}-{world.size}" / name, words)
    return found


def alone(world: World, folder: str, resumed: list[str]) -> dict[str, Any]:
    """The same of one rank, and the histories of the plain loops; the shards' on the batches of several ranks, too."""
    files, found = Path(folder), recipes(world, folder, resumed)
    for name in HERE:
        found[f"plain {name}"] = plain_rows(files, name, files / "plain", epochs=2, **CASES[name].small)
    for ranks in RANKS:
        found[f"merged {ranks}"] = plain_rows(
            files, "shards", files / "plain", merged(ranks), epochs=2, **CASES["shards"].small
        )
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """All of them, with as few starts of ranks as can be: what each rank has found, by the number of ranks."""
    folder = tmp_path_factory.mktemp("gallery")
    copy_double(folder)
    found: dict[Any, Any] = {"folder": folder}
    for ranks, name in KILLED:
        run_ranks(killed, ranks, PATIENCE, ends=-9, folder=str(folder), name=name)
        found["left", ranks, name] = checkpoints(folder / f"killed-{ranks}" / name)
    for ranks in (1, *RANKS):
        names = [name for number, name in KILLED if number == ranks]
        found[ranks] = run_ranks(alone if ranks == 1 else recipes, ranks, PATIENCE, folder=str(folder), resumed=names)
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
    one = runs[1][0]
    same(one[f"plain {name}"], one[f"whole {name}"]["rows"])


@pytest.mark.parametrize("ranks", RANKS)
def test_more_ranks_are_one(runs: dict[str, Any], name: str, ranks: int) -> None:
    found = [rank[f"whole {name}"] for rank in runs[ranks]]
    assert all(rank["rows"] == found[0]["rows"] for rank in found)
    one = runs[1][0]
    if name == "shards":  # its global batches are other ones on another number of ranks
        same(one[f"merged {ranks}"], found[0]["rows"])
    else:
        same(one[f"whole {name}"]["rows"], found[0]["rows"])
        assert_close(one[f"whole {name}"]["predicted"], found[0]["predicted"])


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
        found = rank[f"whole {name}"]
        row = found["rows"][-1]
        validated = {key for key in row if key.startswith("val_")} - {"val_perplexity"}  # after_epoch's own
        assert {f"val_{key}" for key in found["evaluated"]} == validated
        for key, value in found["evaluated"].items():
            assert value == pytest.approx(row[f"val_{key}"], rel=1e-9, abs=1e-9)
        assert found["predicted"] == runs[ranks][0][f"whole {name}"]["predicted"]
        assert len(found["predicted"]) > 0


@pytest.mark.parametrize(("ranks", "name"), KILLED)
def test_a_run_that_was_killed_goes_on_bitwise(runs: dict[str, Any], ranks: int, name: str) -> None:
    left = runs["left", ranks, name]
    assert any("-step-" in one for one in left), "it was killed within an epoch"
    assert "epoch-2" not in left
    found = runs[ranks][0]
    assert found[f"killed {name}"] == found[f"whole {name}"]
    one, other = (
        load_file(runs["folder"] / f"{run}-{ranks}" / name / "it/checkpoints/epoch-2/model.safetensors")
        for run in ("whole", "killed")
    )
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
