"""Ranks that stay up between a test's examples: jobs in as JSON lines, results out as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain.launch.supervisor import free_port
from helpers.commands import popen
from helpers.ranks import rank_process_environment

_WORKER = Path(__file__).with_name("rank_worker.py")
_PATIENCE_SECONDS = 120


class RankPool:
    """`size` CPU ranks that call one test function again and again."""

    def __init__(self, function: Callable[..., Any], size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        port = free_port()
        job = {"file": sys.modules[function.__module__].__file__, "function": function.__name__, "pool": True}
        self._ranks = [
            popen(
                [sys.executable, str(_WORKER), json.dumps(job)],
                env=rank_process_environment(rank, size, port, self._folder.name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # with the workers of its loaders, which may outlive it
            )
            for rank in range(size)
        ]
        self._answers: list[queue.Queue[str]] = [queue.Queue() for _ in self._ranks]
        self._readers = [
            threading.Thread(target=_read, args=(rank, answers), daemon=True)
            for rank, answers in zip(self._ranks, self._answers, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def __call__(self, **arguments: Any) -> list[Any]:
        """Returns each rank's result, in rank order; where one does not come, all say where they are, on stderr."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(arguments) + "\n")
            rank.stdin.flush()
        try:
            return [json.loads(answers.get(timeout=_PATIENCE_SECONDS)) for answers in self._answers]
        except queue.Empty:
            self._send(signal.SIGABRT)  # faulthandler's
            for rank in self._ranks:
                rank.wait(_PATIENCE_SECONDS)
            raise AssertionError(f"no answer within {_PATIENCE_SECONDS} s to {arguments}") from None

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, number)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        try:
            for rank in self._ranks if kind is None else ():
                rank.wait(_PATIENCE_SECONDS)
        finally:
            # A worker that hangs keeps the rank's stdout open, and closing what a thread reads from waits for ever.
            self._send(signal.SIGKILL)
        for rank, reader in zip(self._ranks, self._readers, strict=True):
            rank.wait(_PATIENCE_SECONDS)
            reader.join(_PATIENCE_SECONDS)
            assert not reader.is_alive(), "something of a rank lives on"
            assert rank.stdout is not None
            rank.stdout.close()
        self._folder.cleanup()


def _read(rank: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert rank.stdout is not None
    for line in rank.stdout:
        answers.put(line)
