"""This process's control groups: each one that holds it may have a limit, and the tightest counts."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def own_folders(controller: str, root: Path | None = None, facts: Path | None = None) -> list[Path]:
    """Returns the folders of this process's control group and of all above it, of version 1 and 2, the inmost first.

    SLURM, systemd's CPUQuota= and pods without a cgroup namespace put the limit on a nested one.

    Args:
        controller: such as "memory" or "cpu".
        root: where the file system of control groups is.
        facts: the file that names this process's; see cgroups(7).
    """
    try:
        lines = (facts or OWN).read_text().splitlines()
    except OSError:
        lines = ["0::/", f"0:{controller}:/"]
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = (root or ROOT) / (controller if controllers else "")
        inner = top / path.lstrip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return folders
