"""One SLURM for all tests here; it is brought up by the first one that asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.cluster import Cluster, Plan, cluster, missing, need
from helpers.commands import Dtrain
from helpers.queued import RECIPES, WORDS, Queued


@pytest.fixture(scope="session")
def _slurm() -> Iterator[Cluster]:
    need(missing())
    with cluster(Plan()) as made:
        yield made


@pytest.fixture
def slurm(_slurm: Cluster) -> Iterator[Cluster]:
    """A SLURM of four nodes, without accounting; each test finds it idle and whole."""
    yield _slurm
    _slurm.clear()


@pytest.fixture
def queued(slurm: Cluster, tmp_path: Path) -> Queued:
    """A run that is to be sent there."""
    return Queued(slurm, tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns the run that nothing interrupts, on this machine alone, on so many ranks."""

    @functools.cache
    def run(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"whole-{ranks}")
        done = Dtrain(folder)("train", RECIPES / "long.py", *WORDS, "-n", ranks, "--cpu")
        assert done.code == 0, done.text
        return folder / "runs/it"

    return run
