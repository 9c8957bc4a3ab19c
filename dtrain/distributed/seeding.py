"""Random numbers: one seed, and streams derived from it that are the same, or differ, by purpose."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

_numpy: Any = np.random  # whose type stubs leave out what exchanges its generator

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def derive(seed: int, *purpose: object) -> int:
    """Returns a 63-bit seed for a purpose, such as ("order", "train", epoch) or ("rank", 3)."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators, all devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the process's random streams: Python's, NumPy's, torch's on the CPU and the device."""
    version, numbers, gauss = random.getstate()
    return {
        "python": (version, np.array(numbers, dtype=np.uint32), gauss),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
    }


def load_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


class HostStreams:
    """Seeds Python's and NumPy's global generators for a while, and puts them back as they were.

    Much quicker than `random_state` and its opposite: NumPy's generator is exchanged and not copied. What is lost is
    the second number of a pair of `np.random.randn`, where one was kept.
    """

    def __init__(self) -> None:
        self._ours = np.random.MT19937()
        self._theirs: Any = None
        self._python: Any = None
        self._first: tuple[int, int] = (0, 0)

    def exchange(self, seed: int) -> None:
        """Seeds the generators; `put_back` must follow."""
        self._python = random.getstate()
        self._theirs = _numpy.get_bit_generator()
        _numpy.set_bit_generator(self._ours)
        self._seed(seed)
        self._first = self._draw()
        self._seed(seed)

    def places(self) -> dict[str, int]:
        """Returns, between the two, a checksum of where each generator is."""
        numpy = _numpy_place() if _numpy.get_bit_generator() is self._ours else 0
        return {"Python": zlib.crc32(repr(random.getstate()).encode()), "NumPy": numpy}

    def put_back(self) -> bool:
        """Returns whether anything was drawn, or seeded, since the exchange."""
        drawn = _numpy.get_bit_generator() is not self._ours or self._draw() != self._first
        random.setstate(self._python)
        _numpy.set_bit_generator(self._theirs)
        return drawn

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _draw(self) -> tuple[int, int]:
        return random.getrandbits(64), self._ours.random_raw()


def _numpy_place() -> int:
    _, numbers, *rest = np.random.get_state(legacy=True)
    return zlib.crc32(bytes(numbers) + repr(rest).encode())  # type: ignore[arg-type]


class CommonRandomness:
    """A random state beside the global one, entered for as long as something random must be equal on all ranks.

    While inside, the global generators (Python, NumPy, torch on the CPU) run on this state; outside, they go
    on as if nothing had been drawn.
    """

    def __init__(self, seed: int) -> None:
        with self._kept():
            seed_everything_on_cpu(seed)
            self._state = _state()

    @property
    def state(self) -> tuple[Any, Any, torch.Tensor]:
        """The states of Python's, NumPy's and torch's generators; it is replaced, and not changed."""
        return self._state

    @state.setter
    def state(self, state: tuple[Any, Any, torch.Tensor]) -> None:
        self._state = state

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Switches to this state for the block."""
        with self._kept():
            _restore(self._state)
            try:
                yield
            finally:
                self._state = _state()

    @staticmethod
    @contextlib.contextmanager
    def _kept() -> Iterator[None]:
        outside = _state()
        try:
            yield
        finally:
            _restore(outside)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While inside, if wanted, torch takes algorithms that give the same each time, and raises where it has none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    os.environ[_CUBLAS] = workspace or ":4096:8"  # without it cuBLAS has none
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            del os.environ[_CUBLAS]


def seed_everything_on_cpu(seed: int) -> None:
    """Seeds the generators that `CommonRandomness` switches."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _state() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
