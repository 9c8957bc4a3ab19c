"""Who is blamed for a hang: a rank that waits for the others, in whatever of dtrain's collectives, never is."""

from __future__ import annotations

import ast
import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.ranks import run_ranks
from torch import nn

from dtrain.distributed.world import World
from dtrain.launch.monitor.stack_dump import Frame, main_stack, waits_for_others
from dtrain.version import PACKAGE

_SECONDS = 100.0


def waits() -> dict[str, Callable[[World], object]]:
    """By name, what brings all ranks together."""
    from dtrain.distributed.standing import Whereabouts
    from dtrain.model.gradients.agreement import DONE, GradientAgreement, wait_for_all
    from dtrain.model.gradients.drift import Drift
    from dtrain.model.gradients.flat import average_dense, average_sparse

    dense, sparse = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
    dense.grad = torch.ones(3)
    sparse.grad = torch.ones(3, 2).to_sparse(1)
    return {
        "all_reduce": lambda world: world.all_reduce([1.0]),
        "sum_": lambda world: world.sum_(torch.ones(2)),
        "gather_json": lambda world: world.gather_json("x"),
        "gather_tensors": lambda world: world.gather_tensors(torch.ones(2)),
        "broadcast_": lambda world: world.broadcast_([torch.ones(2)]),
        "share_bytes": lambda world: world.share_bytes(b"x"),
        "average_dense": lambda world: average_dense([dense], world),
        "average_sparse": lambda world: average_sparse([sparse], world),
        "Meeting.hold": lambda world: GradientAgreement(world, 1, Whereabouts(0)).hold(
            DONE, ([], []), strict=False, misfit=False, idle=False
        ),
        "wait_for_all": lambda world: wait_for_all(world, (1, 1), "here"),
        "Drift.compare": lambda world: Drift(world).compare(["w"], [dense], lambda _: True, "here"),
        "DDP's backward": _ddp_step,
    }


def _ddp_step(world: World) -> None:
    net = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    net(torch.ones(1, 1)).sum().backward()


def stacks(world: World, folder: str) -> dict[str, list[str]]:
    """On rank 0, by name, the innermost frame of a rank that waits for one that comes late."""
    found: dict[str, list[str]] = {}
    for number, (name, meet) in enumerate(waits().items()):
        enough = Path(folder) / str(number)
        if world.rank == 1:
            end = time.monotonic() + _SECONDS
            while not enough.exists() and time.monotonic() < end:
                time.sleep(0.02)
            meet(world)
            continue
        with _Looking(enough) as looking:
            meet(world)
        found[name] = looking.still
    return found


class _Looking:
    """Takes the main thread's innermost frame again and again, from another thread.

    Args:
        enough: a file that is made once it was the same ten times in a row: the thread stands still.

    Attributes:
        still: the frame in which it did.
        seen: all frames.
    """

    def __init__(self, enough: Path) -> None:
        self._enough = enough
        self.seen: list[list[str]] = []
        self.still: list[str] = []

    def __enter__(self) -> _Looking:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            with tempfile.TemporaryFile() as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                top = main_stack(file.read().decode())[0]
            self.seen.append([top.file, top.line, top.name])
            if len(self.seen) >= 10 and all(one == self.seen[-1] for one in self.seen[-10:]) and not self.still:
                self.still = self.seen[-1]
                self._enough.touch()


def test_a_rank_that_waits_in_a_collective_is_seen_to_wait(tmp_path: Path) -> None:
    by_name: dict[str, Any] = run_ranks(stacks, 2, folder=str(tmp_path))[0]
    assert len(by_name) == len(waits())
    for name, still in by_name.items():
        assert still and waits_for_others([Frame(*still)]), f"{name}: {still}"


def test_whatever_calls_torch_distributed_counts_as_waiting() -> None:
    """On a GPU the wait is where a number is read, in the module that called the collective."""
    callers = []
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {
            f"{f.value.id}.{f.attr}" for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)
        }
        if names & {"dist.all_reduce", "dist.broadcast", "dist.all_gather", "dist.barrier"} or "store.wait" in names:
            callers.append(path)
    assert len(callers) >= 4
    rest = [str(path) for path in callers if not waits_for_others([Frame(str(path), "1", "f")])]
    assert rest == [str(PACKAGE / "tools/doctor/collectives.py")]  # which has its own limit


def test_a_step_that_works_does_not(tmp_path: Path) -> None:
    with _Looking(tmp_path / "enough") as looking:
        end = time.monotonic() + _SECONDS
        while len(looking.seen) < 3 and time.monotonic() < end:
            sum(range(100))
    assert looking.seen
    assert not any(waits_for_others([Frame(*one)]) for one in looking.seen)
    assert Path(looking.seen[0][0]).name == Path(__file__).name
