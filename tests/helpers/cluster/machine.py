"""The first process of a virtual machine, run in namespaces of its own: machine.py JSON.

It tells its process id on the real machine, waits for a line (its network cable is in), makes itself at home, says
"ready", and ends when its input does; the kernel then ends all that runs on the machine. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path


def run(*argv: str) -> None:
    """Runs a command that has to succeed."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr.strip()}")


def set_up(facts: dict[str, str]) -> None:
    """Gives the machine its name and address; a node its own /proc and /dev/shm; the login node the files of all."""
    socket.sethostname(facts["name"])
    if facts["etc"]:
        run("ip", "link", "add", "br0", "type", "bridge")
        run("mount", "--bind", f"{facts['etc']}/hosts", "/etc/hosts")
        if Path("/etc/slurm").is_dir():  # for jobs that are sent without their environment, and so without SLURM_CONF
            run("mount", "--bind", facts["etc"], "/etc/slurm")
    else:
        run("mount", "-t", "proc", "proc", "/proc")
        run("mount", "-t", "tmpfs", "-o", "mode=1777,size=50%", "none", "/dev/shm")  # noqa: S108
    device = "br0" if facts["etc"] else "eth0"
    run("ip", "addr", "add", f"{facts['address']}/24", "dev", device)
    for link in ("lo", device):
        run("ip", "link", "set", link, "up")


def reap() -> None:
    """Takes note of all that has ended here, as the first process has to."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    facts = json.loads(sys.argv[1])
    # /proc is still the real machine's, and tells the process id there.
    print(Path("/proc/self").readlink(), flush=True)
    while os.read(0, 1) not in (b"\n", b""):
        pass
    set_up(facts)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([0], [], [], 0.2)
        if ready and not os.read(0, 1):
            return
        reap()


if __name__ == "__main__":
    main()
