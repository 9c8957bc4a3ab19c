"""Whether this machine can have a SLURM of virtual nodes, and what it lacks."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

import pytest

_SYSTEM = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmstepd": "slurmd",
    "sbatch": "slurm-client",
    "squeue": "slurm-client",
    "scontrol": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
_ACCOUNTING = {"mariadbd": "mariadb-server-core", "slurmdbd": "slurmdbd"}
# The kinds of namespace that a virtual machine has for itself.
SPACES = ("--net", "--uts", "--ipc", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child")


def search_path() -> str:
    """PATH, and the folders of daemons, which a plain user's has not."""
    return os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM])


def program(name: str) -> str:
    """The path of a command that was found to be there."""
    found = shutil.which(name, path=search_path())
    assert found is not None, f"{name} is not on this machine"
    return found


def missing(*, accounting: bool = False, path: str | None = None) -> str | None:
    """What this machine lacks for a SLURM of virtual nodes, in words; None where there can be one.

    Args:
        accounting: whether it shall have sacct.
        path: where commands are looked for; else PATH and the system's folders.
    """
    packages = _PACKAGES | (_ACCOUNTING if accounting else {})
    where = search_path() if path is None else path
    lacking = [name for name in packages if shutil.which(name, path=where) is None]
    if lacking:
        remedy = " ".join(dict.fromkeys(packages[name] for name in lacking))
        return f"no {lacking[0]} on this machine (apt-get install --no-install-recommends {remedy})"
    if os.geteuid() != 0:
        return "a SLURM of virtual nodes needs root"
    return None if _namespaces() else "this kernel or container allows no namespaces, which virtual nodes need"


@functools.cache
def _namespaces() -> bool:
    words = ("ip", "link", "add", "name", "probe0", "type", "veth", "peer", "name", "probe1")
    probe = subprocess.run([program("unshare"), *SPACES, program("ip"), *words[1:]], check=False, capture_output=True)
    return probe.returncode == 0


def need(lack: str | None) -> None:
    """Skips the test with the reason where something is lacking; in CI that is a failure, for nobody would see it."""
    if lack is None:
        return
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"CI has to run this test, but: {lack}", pytrace=False)
    pytest.skip(lack)
