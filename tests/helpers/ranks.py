"""Runs a test's function as real ranks and brings one value per rank back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.launch.local import free_port, rank_environment
from helpers.commands import clean_environment

_WORKER = Path(__file__).with_name("rank_worker.py")
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def run_ranks(
    function: Callable[..., Any], size: int, timeout: float = 240, env: dict[str, str] | None = None, **arguments: Any
) -> list[Any]:
    """Calls `function(world, **arguments)` on `size` CPU ranks.

    Args:
        function: a function at the top of a test module; its result must be JSON.
        size: number of ranks.
        timeout: seconds for all of them.
        env: more environment variables.
        arguments: JSON values.

    Returns:
        each rank's result, in rank order.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(sys.modules[function.__module__].__file__ or "")
        job = json.dumps({"file": str(file), "function": function.__name__, "arguments": arguments, "out": folder})
        ranks = [
            subprocess.Popen(
                [sys.executable, str(_WORKER), job],
                env=rank_process_environment(rank, size, port, folder) | (env or {}),
            )
            for rank in range(size)
        ]
        try:
            codes = [rank.wait(timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        assert codes == [0] * size, f"exit codes by rank: {codes}"
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def rank_process_environment(rank: int, size: int, port: int, folder: str) -> dict[str, str]:
    """The environment of one rank that a test starts."""
    variables = rank_environment(rank, size, port, folder)
    launch = {name: variables[name] for name in _LAUNCH if name in variables}
    return clean_environment(**launch, OMP_NUM_THREADS="1")
