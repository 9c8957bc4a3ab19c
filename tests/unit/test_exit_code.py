"""The exit code of a process that has done its work is what became of that, whatever its exit functions do."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.commands import clean_environment

ENDS = """
import atexit, os, sys
from dtrain.launch.signals.process_exit import enforce_exit
code, other = int(sys.argv[1]), int(sys.argv[2])

def at_exit():
    child = os.fork()
    if child == 0:
        os._exit(3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(other)

atexit.register(at_exit)
enforce_exit(code)
sys.exit(code)
"""


@pytest.mark.parametrize(("code", "other"), [(0, 75), (1, 0), (75, 0), (0, 0)])
def test_an_exit_function_does_not_choose_it(code: int, other: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(code), str(other)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "child 3\n")
    said = f"os._exit({other}) was called as the process ended" in done.stderr
    assert said is (code != other), done.stderr
