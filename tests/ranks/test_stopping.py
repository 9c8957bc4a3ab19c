"""All ranks stop after one and the same step, whoever is asked, and whenever."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.sweep import FULL

from dtrain.distributed.stopping import Stopping
from dtrain.distributed.world import World, bring_up
from dtrain.errors import StopRequested
from dtrain.launch.signals.stop_request import StopRequest


def walk(
    world: World, request: StopRequest, places: int, file: Path | None = None, pause: float = 0.0, begin: float = 0.0
) -> dict[str, Any]:
    """Goes by places as training does, all ranks side by side; returns where it stopped."""
    told = ""
    time.sleep(begin)
    done = 0
    stopping = Stopping(world, request, file, lambda: done == places)
    began = time.monotonic()
    try:
        with stopping:
            for place in range(1, places + 1):
                world.all_reduce([1.0])
                time.sleep(pause)
                done = place
                stopping.step()
    except StopRequested as stop:
        told = str(stop)
    ended = time.monotonic()
    return {"done": done, "told": told, "asked": stopping.asked, "seconds": ended - began}


def many(world: World, seeds: list[int], folder: str) -> list[Any]:
    """One walk for each seed: who is asked, when, and how often are drawn from it, alike on all ranks."""
    results = []
    for seed in seeds:
        draw = random.Random(seed)
        whom = [rank for rank in range(world.size) if draw.random() < 0.5] or [draw.randrange(world.size)]
        how = draw.choice(["before", "soon", "late", "file"])
        places, pause = draw.choice([40, 400]), draw.choice([0.0, 0.001, 0.01])
        said: list[str] = []
        request, file = StopRequest(tell=said.append), Path(folder) / f"STOP-{seed}"
        begins = [draw.choice([0.0, 0.0, 0.2]) for _ in range(world.size)]
        timer = None
        if how == "file" and world.is_main:
            file.touch()
        elif how == "before" and world.rank in whom:
            request.ask(f"rank {world.rank}")
        elif how in ("soon", "late") and world.rank in whom:
            after = 0.05 if how == "soon" else draw.uniform(0.9, 1.1) * places * (pause + 0.0007)
            timer = threading.Timer(after, ask_often, [request])
            timer.start()
        results.append(walk(world, request, places, file, pause, begins[world.rank]))
        world.all_reduce([1.0])
        if timer is not None:
            timer.cancel()
            timer.join()
        results[-1] |= {"said": said, "how": how, "places": places, "limit": 0.9 * places * pause}
        # Each walk has its own words in the store, as each run has.
        world.all_reduce([1.0])
        if world.is_main and world.size > 1:
            forget(world)
        world.all_reduce([1.0])
    return results


def ask_often(request: StopRequest) -> None:
    for _ in range(100):
        request.ask("a signal")


def forget(world: World) -> None:
    from torch.distributed.distributed_c10d import _get_default_store

    keys = ["asked", "0/answer", *[f"0/limit/{rank}" for rank in range(world.size)]]
    for key in keys:
        _get_default_store().delete_key(f"dtrain/stop/{key}")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_stop_after_the_same_step(size: int, tmp_path: Path) -> None:
    seeds = list(range(200 if FULL else 8))
    ranks = (
        [many(bring_up(cpu=True), seeds, str(tmp_path))]
        if size == 1
        else run_ranks(many, size, seeds=seeds, folder=str(tmp_path))
    )
    for seed, results in zip(seeds, zip(*ranks, strict=True), strict=True):
        where = [(found["done"], found["told"]) for found in results]
        assert len(set(where)) == 1, f"seed {seed}: {where}"
        first = results[0]
        stopped = bool(first["told"])
        assert stopped == (first["done"] < first["places"]), f"seed {seed}: {first}"
        assert all(len(found["said"]) <= 1 for found in results)
        assert not stopped or any(first["told"] == f"on request ({found['said'][0]})" for found in results)
        if first["how"] in ("before", "file", "soon") and first["limit"] > 1.5:
            assert stopped, f"seed {seed}: {first}"
