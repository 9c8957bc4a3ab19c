"""Numbers in words."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def size(count: float) -> str:
    """Returns bytes as "64 MiB" or "1.5 GiB"."""
    for unit, name in ((GIB << 10, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:.0f} {name}"
    return f"{count:.0f} B"


def seconds(span: float) -> str:
    """Returns seconds as "0.4 ms" or "1.2 s"."""
    return f"{span:.2g} s" if span >= 1 else f"{1e3 * span:.2g} ms" if span >= 1e-4 else f"{1e6 * span:.0f} us"


def rate(bytes_per_second: float) -> str:
    """Returns a speed as "120 MB/s", "1.2 GB/s" or "3.4 TB/s"; decimal, as vendors count."""
    mega = bytes_per_second / 1e6
    if mega >= 1e6:
        return f"{mega / 1e6:.3g} TB/s"
    return f"{mega / 1e3:.3g} GB/s" if mega >= 1000 else f"{mega:.3g} MB/s"


def many(count: int, word: str) -> str:
    """Returns "1 rank" or "2 ranks"."""
    return f"{count} {word}{'' if count == 1 else 's'}"
