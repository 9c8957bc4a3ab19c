"""What ranks measure together: whether an all-reduce and a product are right, and how fast; needs torch.

Speeds of an all-reduce are bus bandwidths, 2 (n - 1) / n * bytes / seconds, as nccl-tests counts: the number does not
depend on how many ranks there are, and is what the slowest link carries.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from dtrain.distributed.world import World
from dtrain.tools.doctor.card import bench_of, measure_card
from dtrain.tools.doctor.pairing import rounds_of_pairs

_MIB = 1 << 20
_CPU_BYTES, _GPU_BYTES, _PAIR_BYTES = 16 * _MIB, 128 * _MIB, 4 * _MIB
_SPAN, _FEWEST, _MOST = 0.4, 3, 20
_PAIR_REPEATS = 6
_PERIOD = 5  # of the numbers that are added up: their sums stay whole numbers in float32 on 2,000 ranks
_SIDE = {"cpu": 512, "cuda": 4096}


def measure(world: World, *, gpu_too: bool = False) -> dict[str, Any]:
    """Returns what all ranks found, the same on each but for `gpu`, as JSON can hold it.

    Args:
        world: the ranks.
        gpu_too: whether rank 0, which computes on the CPU, shall try a GPU.

    Returns:
        `torch`: versions, of each rank's machine the first one's; `reduces`: a list, for each backend, of what
        `_reduce` returns; `ranks`: for each rank its node, host, device, floating point operations a second, and
        whether its product was right; `pairs`: [node, node, bytes a second] of nodes that were timed in pairs; `gpu`:
        name, speed and whether its product was right, of the GPU that rank 0 tried; `cards`: for each rank its host,
        its GPU's name and speeds, or None.
    """
    reduces = []
    if world.size > 1:
        reduces.append(_reduce(world, world.device, None, dist.get_backend()))
        if world.device.type != "cpu":
            gloo = dist.new_group(backend="gloo")
            reduces.append(_reduce(world, torch.device("cpu"), gloo, "gloo"))
    _together(world)
    speed, right = _product(world.device)
    node = world.rank // world.local_size
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    mine = [node, os.uname().nodename, device, speed, right]
    return {
        "torch": torch_facts(),
        "reduces": reduces,
        "ranks": world.gather_json(mine),
        "pairs": _pairs(world),
        "gpu": _gpu() if gpu_too and world.is_main and torch.cuda.is_available() else None,
        "cards": world.gather_json(_card(world, gpu_too=gpu_too)),
    }


def _gpu() -> list[Any]:
    device = torch.device("cuda", 0)
    return [torch.cuda.get_device_name(device), *_product(device)]


def _card(world: World, *, gpu_too: bool) -> list[Any] | None:
    """Returns host, name and speeds of this rank's GPU, or of the one that rank 0 tries; None where there is none."""
    tries = gpu_too and world.is_main and torch.cuda.is_available()
    if world.device.type != "cuda" and not tries:
        return None
    device = world.device if world.device.type == "cuda" else torch.device("cuda", 0)
    return [os.uname().nodename, torch.cuda.get_device_name(device), measure_card(bench_of(device))]


def torch_facts() -> dict[str, Any]:
    """Returns what this torch was built for, and what of it is there."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""  # type: ignore[no-untyped-call]
    available = torch.cuda.is_available()
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "nccl": nccl,
        "gloo": dist.is_gloo_available(),
        "gpus": torch.cuda.device_count() if available else 0,
        "threads": torch.get_num_threads(),
    }


def _reduce(world: World, device: torch.device, group: dist.ProcessGroup | None, backend: str) -> dict[str, Any]:
    """Returns one backend's `wrong` ranks, bus `speed` in bytes a second, and `latency` in seconds of eight numbers."""
    count = (_CPU_BYTES if device.type == "cpu" else _GPU_BYTES) // 4
    pattern = (torch.arange(count, device=device) % _PERIOD).float()
    data = pattern * (world.rank + 1)
    dist.all_reduce(data, group=group)
    right = bool(torch.equal(data, pattern * (world.size * (world.size + 1) // 2)))
    told = world.gather_json(right)
    latency = statistics.median(_spans(torch.ones(8, device=device), _MOST, group))
    repeats = _repeats(world, max(_spans(data.zero_(), _FEWEST, group)))
    span = statistics.median(_spans(data, repeats, group))
    return {
        "backend": backend,
        "bytes": count * 4,
        "wrong": [rank for rank, ok in enumerate(told) if not ok],
        "speed": _bus_speed(world.size, count * 4, span),
        "latency": latency,
    }


def _bus_speed(ranks: int, count: int, span: float) -> float:
    return 2 * (ranks - 1) / ranks * count / span


def _spans(data: torch.Tensor, repeats: int, group: dist.ProcessGroup | None) -> list[float]:
    """Returns the seconds of so many all-reduces of a tensor, each begun together; all ranks of the group call it."""
    spans = []
    for _ in range(repeats):
        dist.barrier(group)
        _wait_for(data.device)
        began = time.perf_counter()
        dist.all_reduce(data, group=group)
        _wait_for(data.device)
        spans.append(time.perf_counter() - began)
    return spans


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _repeats(world: World, span: float) -> int:
    """Returns how often to repeat what takes so long, the same on all ranks."""
    slowest = max(world.gather_json(span))
    return max(_FEWEST, min(_MOST, int(_SPAN / max(slowest, 1e-6))))


def _together(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def _product(device: torch.device) -> tuple[float, bool]:
    """Returns floating point operations a second of this device in float32, and whether a product is right."""
    small = [torch.arange(64 * 64).reshape(64, 64).mul(factor).remainder(7).double() for factor in (3, 5)]
    exact = small[0] @ small[1]
    right = bool(torch.equal((small[0].float().to(device) @ small[1].float().to(device)).cpu().double(), exact))
    side = _SIDE.get(device.type, 1024)
    left = torch.ones(side, side, device=device)
    spans: list[float] = []
    until = time.perf_counter() + _SPAN
    _ = left @ left  # the first one readies the library
    while len(spans) < _FEWEST or (time.perf_counter() < until and len(spans) < _MOST):
        _wait_for(device)
        began = time.perf_counter()
        _ = left @ left
        _wait_for(device)
        spans.append(time.perf_counter() - began)
    return 2 * side**3 / min(spans), right


def _pairs(world: World) -> list[tuple[int, int, float]]:
    """Times all-reduces of nodes in pairs, several pairs at once; see `pairing`."""
    nodes = world.size // world.local_size
    if nodes < 2 or world.size % world.local_size:
        return []
    found: list[tuple[int, int, float]] = []
    for pairs in rounds_of_pairs(nodes):
        groups = {pair: dist.new_group(_ranks_of(pair, world.local_size)) for pair in pairs}  # by all, in one order
        mine = [pair for pair in pairs if world.rank in _ranks_of(pair, world.local_size)]
        _together(world)
        speeds = [(*pair, _pair_speed(world, groups[pair])) for pair in mine]
        for told in world.gather_json(speeds)[:: world.local_size]:
            found += [tuple(one) for one in told if tuple(one[:2]) not in {seen[:2] for seen in found}]
    return found


def _ranks_of(pair: tuple[int, int], local_size: int) -> list[int]:
    return [node * local_size + local for node in pair for local in range(local_size)]


def _pair_speed(world: World, group: Any) -> float:
    data = torch.ones(_PAIR_BYTES // 4, device=world.device)
    span = min(_spans(data, _PAIR_REPEATS, group))  # the best: what runs there for a moment only is no matter
    return _bus_speed(2 * world.local_size, _PAIR_BYTES, span)
