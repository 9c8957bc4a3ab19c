"""Fixtures that every test may use, and guards against what tests must not leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
from helpers import parallel
from helpers.commands import STARTS, Dtrain, children_of_tests
from hypothesis import settings

from dtrain.launch.terminal import guarded

# Examples are not timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Whatever started the tests may ignore these (nohup, a shell's &), which children would inherit, and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_REAPER_SECONDS = 30.0
TESTS = Path(__file__).parent
RECIPES = TESTS / "recipes"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Has whole folders of tests run in several processes; see `helpers.parallel`."""
    number = parallel.workers(config)
    if number is not None:
        config.option.numprocesses, config.option.dist = number, "loadscope"
    if hasattr(config, "workerinput") and config.option.basetemp:
        # popen-gw0 is longer than what lines of 80 columns and the paths of sockets leave room for
        config.option.basetemp = str(Path(config.option.basetemp).with_name(config.workerinput["workerid"]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Which tests one process runs; `--dist load` and the like stay what they are."""
    return parallel.scheduler(config, log) if config.option.dist == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by the folder that it is in; all but those of tests/unit start processes, and are slow."""
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0]
        if kind != "unit":
            item.add_marker(kind)
            item.add_marker("slow")
    parallel.in_order(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes hands on how it started commands."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["starts"] = dict(STARTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Adds up how several processes started commands."""
    for kind, number in getattr(node, "workeroutput", {}).get("starts", {}).items():
        STARTS[kind] += number


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how commands were started: many that could not be warm make the tests slow."""
    if any(STARTS.values()):
        terminalreporter.write_line(", ".join(f"{number} {kind} starts" for kind, number in STARTS.items()))


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
    guarded._lost.clear()  # what a test has lost of its output is no news for the runs of the next one
    before = dict(os.environ)
    yield
    # torch sets the second one by itself.
    after = {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")}
    before.pop("TORCHINDUCTOR_CACHE_DIR", None)
    before.pop("PYTEST_CURRENT_TEST", None)
    assert after == before, "a test changed the environment"
    # The reaper of a launcher that was killed ends by itself, a moment after it.
    deadline = time.monotonic() + _REAPER_SECONDS
    while (left := children_of_tests()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == [], "a test left processes behind"


@pytest.fixture
def dtrain(tmp_path: Path) -> Dtrain:
    """Runs the installed `dtrain` command in an empty folder."""
    return Dtrain(tmp_path)


@pytest.fixture
def recipes() -> Path:
    """The folder of the tests' recipes."""
    return RECIPES
