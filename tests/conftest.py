"""Fixtures that every test may use, and guards against what tests must not leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
from helpers.commands import Dtrain, children_of_tests
from hypothesis import settings

# Examples are not timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Whatever started the tests may ignore these (nohup, a shell's &), which children would inherit, and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

RECIPES = Path(__file__).parent / "recipes"


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that are killed leave their temporary files; here they are in one folder, which goes at the end."""
    tmp_path_factory.getbasetemp()  # which stays where it is
    before = os.environ.get("TMPDIR")
    folder = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="dtrain-tests-")
    # After multiprocessing, which keeps a folder in it, has removed that.
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)
    yield
    tempfile.tempdir = None
    os.environ.pop("TMPDIR")
    if before is not None:
        os.environ["TMPDIR"] = before


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Each test leaves the environment as it was, and no process that dtrain started."""
    before = dict(os.environ)
    yield
    # torch sets the second one by itself.
    after = {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")}
    before.pop("TORCHINDUCTOR_CACHE_DIR", None)
    before.pop("PYTEST_CURRENT_TEST", None)
    assert after == before, "a test changed the environment"
    assert children_of_tests() == [], "a test left processes behind"


@pytest.fixture
def dtrain(tmp_path: Path) -> Dtrain:
    """Runs the installed `dtrain` command in an empty folder."""
    return Dtrain(tmp_path)


@pytest.fixture
def recipes() -> Path:
    """The folder of the tests' recipes."""
    return RECIPES
