"""Runs a test's function as real ranks and brings one value per rank back."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.launch.supervisor import free_port, rank_environment
from helpers.commands import SERVERS, clean_environment
from helpers.rank_worker import as_process

if TYPE_CHECKING:
    from dtrain.distributed.world import World

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
_HEAVY = [
    "torch",
    "torch._dynamo",  # which each rank's first optimizer imports
    "accelerate",
    "pandas",
    "sklearn.datasets",
    "dtrain.trainer.train",
    "dtrain.api.function",
    "dtrain.api.keras",
    "dtrain.api.script",
    # What test modules import, as each rank does with its own.
    "pytest",
    "hypothesis",
    "numpy.testing",
    "torchmetrics.classification",
    "sklearn.datasets",
    "sklearn.metrics",
    "sklearn.model_selection",
    "safetensors.torch",
    "helpers.commands",
    "helpers.sweep",
    "helpers.frozen",
]


def run_ranks(
    function: Callable[..., Any],
    size: int,
    timeout: float = 240,
    env: dict[str, str] | None = None,
    ends: int = 0,
    **arguments: Any,
) -> list[Any]:
    """Calls `function(world, **arguments)` on `size` CPU ranks.

    Args:
        function: a function at the top of a test module; its result must be JSON.
        size: number of ranks.
        timeout: seconds for all of them.
        env: more environment variables.
        ends: the exit code that each rank must end with; -9 for SIGKILL.
        arguments: JSON values.

    Returns:
        each rank's result, in rank order; nothing where they end with another code than 0.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = sys.modules[function.__module__].__file__
        job = {"file": file, "function": function.__name__, "arguments": arguments, "out": folder}
        ranks = [
            _server().Process(
                target=as_process, args=(job, rank_process_environment(rank, size, port, folder) | (env or {}))
            )
            for rank in range(size)
        ]
        end = time.monotonic() + timeout
        try:
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(max(0.0, end - time.monotonic()))
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        codes = [rank.exitcode for rank in ranks]
        assert codes == [ends] * size, f"exit codes by rank: {codes}"
        if ends:
            return []
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def write_once(path: Path, text: str, world: World | None) -> Path:
    """Writes a file that all ranks are to read: rank 0 does, and the others wait, who might read half of it.

    Args:
        path: the file.
        text: its content.
        world: the ranks; None for one.
    """
    if world is None or world.is_main:
        path.write_text(text)
    if world is not None:
        world.gather_json(0)
    return path


@functools.cache
def _server() -> ForkServerContext:
    """Starts processes that have imported torch and dtrain already, which takes a process of its own seconds.

    It ends with the tests; what it starts carries their mark.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    resource_tracker.ensure_running()
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(clean_environment(OMP_NUM_THREADS="1"))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    SERVERS.add(forkserver._forkserver._forkserver_pid)
    return context


def rank_process_environment(rank: int, size: int, port: int, folder: str) -> dict[str, str]:
    """The environment of one rank that a test starts."""
    variables = rank_environment(rank, size, port, folder)
    launch = {name: variables[name] for name in _LAUNCH if name in variables}
    return clean_environment(**launch, OMP_NUM_THREADS="1")
