"""The memory that this process and its children may still take: of the machine, and of their control groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtrain.launch.env.cgroups import own_folders

_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # of cgroup 2 and 1


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        free: of the machine's, what is available.
        total: the machine's.
        group: what is left of the tightest control group, and its limit; None where there is no limit.
    """

    free: int
    total: int
    group: tuple[int, int] | None = None

    @property
    def grouped(self) -> bool:
        """Whether the control group is what ends first."""
        return self.group is not None and self.group[0] < self.free

    @property
    def left(self) -> int:
        """What may still be taken."""
        return self.free if self.group is None else min(self.free, self.group[0])


def read_memory() -> Memory | None:
    """Returns what there is now; None on a system that does not tell, which is any but Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    table = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(table["MemAvailable"], table["MemTotal"], _group_left())


def _group_left() -> tuple[int, int] | None:
    found = []
    for folder in own_folders("memory"):
        for limit, used in _LIMITS:
            try:
                most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            except (OSError, ValueError):
                continue
            if most.isdigit():  # and not "max"
                found.append((max(0, int(most) - now), int(most)))
    return min(found, default=None)
