"""How fast a GPU is: products in bf16, copies from pageable and pinned memory, and within its own memory.

What a card is known for are its maker's figures: dense products in bf16 with float32 sums, and memory bandwidth. A
copy within the memory reads and writes, so that its bytes count twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.words import rate

CARD = "GPU speed"
_TERA = 1e12
_FEWEST, _MOST, _SPAN = 3, 20, 0.3
_PART = 0.5  # of what a card is known for, below which something is wrong with it
_SLOW_PINNED = 6e9  # bytes a second; PCIe 3 with 16 lanes has 12

# (part of the name, TFLOP/s in bf16, bytes a second of the memory); the first one that fits.
_KNOWN = (
    ("B200", 2250, 8.0e12),
    ("H200", 989, 4.8e12),
    ("H100 PCIe", 756, 2.0e12),
    ("H100 NVL", 835, 3.9e12),
    ("H100", 989, 3.35e12),
    ("A100-SXM4-80GB", 312, 2.04e12),
    ("A100 80GB PCIe", 312, 1.94e12),
    ("A100", 312, 1.56e12),
    ("L40S", 362, 0.86e12),
    ("L4", 121, 0.30e12),
    ("A10G", 70, 0.60e12),
    ("A10", 125, 0.60e12),
    ("RTX A6000", 155, 0.77e12),
    ("RTX 4090", 165, 1.01e12),
    ("RTX 3090", 71, 0.94e12),
)


@dataclass(frozen=True)
class Bench:
    """Where and how large what is timed is.

    Attributes:
        device: the card.
        side: of the matrices.
        count: bytes of a copy.
        wait: returns once the device has done what it was sent.
        pins: whether there is pinned memory.
    """

    device: torch.device
    side: int
    count: int
    wait: Callable[[], object]
    pins: bool


def bench_of(device: torch.device) -> Bench:
    """Returns what is timed on a CUDA device."""
    return Bench(device, 8192, 256 << 20, lambda: torch.cuda.synchronize(device), pins=True)


def measure_card(bench: Bench) -> dict[str, float]:
    """Returns `bf16`, operations a second, and `pageable`, `pinned` and `within`, bytes a second, of one card."""
    left = torch.ones(bench.side, bench.side, device=bench.device, dtype=torch.bfloat16)
    found = {"bf16": 2 * bench.side**3 / _span(lambda: left @ left, bench.wait)}
    host = torch.zeros(bench.count, dtype=torch.uint8)
    there, other = (torch.empty(bench.count, dtype=torch.uint8, device=bench.device) for _ in range(2))
    found["pageable"] = bench.count / _span(lambda: there.copy_(host), bench.wait)
    if bench.pins:
        fast = host.pin_memory()
        found["pinned"] = bench.count / _span(lambda: there.copy_(fast, non_blocking=True), bench.wait)
    found["within"] = 2 * bench.count / _span(lambda: other.copy_(there), bench.wait)
    return found


def _span(work: Callable[[], object], wait: Callable[[], object]) -> float:
    """Returns the least seconds that some work takes, of several times."""
    work()  # the first one readies the library
    spans: list[float] = []
    until = time.perf_counter() + _SPAN
    while len(spans) < _FEWEST or (time.perf_counter() < until and len(spans) < _MOST):
        wait()
        began = time.perf_counter()
        work()
        wait()
        spans.append(time.perf_counter() - began)
    return max(min(spans), 1e-9)


def judge_card(name: str, found: dict[str, float], where: str = "") -> Finding:
    """Compares a card's speeds with those that its kind is known for.

    Args:
        name: the card's, as its driver says.
        found: what `measure_card` returned.
        where: which one of several it is.
    """
    known = next((figures for figures in _KNOWN if figures[0] in name), None)
    pinned = f"{rate(found['pinned'])} pinned, " if "pinned" in found else ""
    words = (
        f"{name}{where and f' ({where})'}: {found['bf16'] / _TERA:.3g} TFLOP/s in bf16{_of(found['bf16'], known, 1)}; "
        f"copies to it: {pinned}{rate(found['pageable'])} pageable; within it: {rate(found['within'])}"
        f"{_of(found['within'], known, 2)}"
    )
    if known is not None and found["bf16"] < _PART * known[1] * _TERA:
        remedy = "check who else uses it (nvidia-smi), and whether it is throttled: nvidia-smi -q -d PERFORMANCE"
        return Finding(CARD, "warn", words, remedy)
    if known is not None and found["within"] < _PART * known[2]:
        return Finding(CARD, "warn", words, "check who else uses it, and its memory: nvidia-smi -q -d ECC")
    if found.get("pinned", _SLOW_PINNED) < _SLOW_PINNED:
        return Finding(CARD, "warn", words, "check the card's PCIe link: nvidia-smi -q | grep -A 6 'GPU Link Info'")
    return passed(CARD, words)


def judge_cards(cards: list[Any]) -> list[Finding]:
    """Returns a finding for the slowest of each kind of card.

    Args:
        cards: for each rank [host, name, speeds]; None for one on the CPU.
    """
    kinds: dict[str, list[Any]] = {}
    for rank, card in enumerate(cards):
        if card is not None:
            kinds.setdefault(card[1], []).append((rank, *card))
    found = []
    for name, some in kinds.items():
        rank, host, _, speeds = min(some, key=lambda one: one[3]["bf16"])
        found.append(judge_card(name, speeds, f"rank {rank} of {host}, the slowest of {len(some)}" * (len(some) > 1)))
    return found


def _of(speed: float, known: tuple[str, float, float] | None, figure: int) -> str:
    if known is None:
        return ""
    whole = known[1] * _TERA if figure == 1 else known[2]
    return f" ({speed / whole:.0%} of its {f'{known[1]:.0f} TFLOP/s' if figure == 1 else rate(whole)})"
