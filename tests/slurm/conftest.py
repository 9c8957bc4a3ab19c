"""One SLURM for all tests here; it is brought up by the first one that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cluster import Cluster, Plan, cluster, missing, need
from helpers.commands import BIN, Dtrain
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
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run that nothing interrupts, on this machine alone, by the number of its ranks."""
    runs: dict[int, Path] = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"whole-{ranks}")
        done = Dtrain(folder).run(BIN / "dtrain", "train", RECIPES / "long.py", *WORDS, "-n", ranks, "--cpu")
        assert done.code == 0, done.text
        runs[ranks] = folder / "runs/it"
    return runs
