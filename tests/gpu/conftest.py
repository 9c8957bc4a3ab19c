"""What needs a GPU: `pytest tests/gpu`, less than five minutes on one. It prints a table of what was measured.

`--try-on-cpu` runs what can be tried without one, so that the tests themselves can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

ROWS = pytest.StashKey[list[tuple[str, str]]]()
TRIED = "--try-on-cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(TRIED, action="store_true", help="try these tests on the CPU, where that is possible")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if request.config.getoption(TRIED, default=False):
        return torch.device("cpu")
    pytest.skip("needs a CUDA GPU: torch.cuda.is_available() is False")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The GPU, for what cannot be tried without one."""
    return device if device.type == "cuda" else pytest.skip("cannot be tried on the CPU")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that give the same each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Adds a line to the table: what was measured, and the result."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda what, result: rows.append((what, str(result)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (a trial: these are no figures)"
    terminalreporter.section(f"measured on {where}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    width = max(len(what) for what, _ in rows)
    for what, result in rows:
        terminalreporter.write_line(f"{what:<{width}}  {result}")
