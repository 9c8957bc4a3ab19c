"""SLURM's files and daemons, on machines that are on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers.cluster import settings
from helpers.cluster.machines import Machine
from helpers.cluster.needs import program
from helpers.cluster.settings import Plan
from helpers.running import wait_for

_FOLDERS = ("etc", "run", "spool", "log", "state", "munge", "dev", "sbin", "db")


def lay_out(plan: Plan, base: Path) -> None:
    """Makes all folders and files in an empty folder."""
    base.chmod(0o755)  # munged and slurmd look at it
    for name in (*_FOLDERS, *(f"spool/{node}" for node in plan.names())):
        (base / name).mkdir(mode=0o755)
    files = {
        "etc/slurm.conf": settings.slurm_conf(plan, base),
        "etc/gres.conf": settings.gres_conf(plan, base),
        "etc/slurmdbd.conf": settings.slurmdbd_conf(base),
        "etc/hosts": settings.hosts(plan),
        "sbin/slurmstepd": settings.stepd_script(os.path.realpath(sys.executable), program("slurmstepd")),
    }
    for name, text in files.items():
        (base / name).write_text(text)
    (base / "etc/slurmdbd.conf").chmod(0o600)
    (base / "sbin/slurmstepd").chmod(0o755)
    for number in range(plan.gpus):  # each a copy of /dev/null
        os.mknod(base / f"dev/gpu{number}", 0o020666, os.makedev(1, 3))


def daemons_environment(base: Path) -> dict[str, str]:
    """The environment of SLURM's daemons and of nobody else: nothing of the tests' own gets into a job through them."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "LANG": "C.UTF-8", "SLURM_CONF": f"{base}/etc/slurm.conf"}


def start_munge(login: Machine, base: Path) -> None:
    """Starts munged with a key of its own; its socket is a file that all machines see."""
    folder = base / "munge"
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    # --force: a folder above that others may write to, as /tmp is, does not matter here
    login.serve("munged", "munged", "--foreground", "--force", *options)
    wait_for((folder / "socket").exists, "munged's socket", 20)


def start_accounting(login: Machine, base: Path) -> None:
    """Starts the database and slurmdbd, and makes the cluster known to it."""
    data = base / "db"
    login.serve(
        "mariadbd",
        "mariadbd",
        *("--no-defaults", "--user=root", "--skip-networking", "--skip-grant-tables", "--performance-schema=OFF"),
        *(f"--datadir={data}", f"--socket={data}/socket", f"--pid-file={data}/pid"),
        *("--innodb-flush-log-at-trx-commit=2", "--innodb-lock-wait-timeout=900", "--innodb-buffer-pool-size=64M"),
    )
    wait_for((data / "socket").exists, "mariadbd's socket", 60)
    login.serve("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=f"{data}/socket")  # where libmariadb looks
    # The client repeats by itself what slurmdbd is not ready for.
    wait_for(lambda: _known(login), "slurmdbd to know the cluster", 60)


def _known(login: Machine) -> bool:
    tried = ("sacctmgr", "--immediate", "--quiet", "add", "cluster", settings.NAME)
    listed = ("sacctmgr", "--noheader", "--parsable2", "list", "cluster", "format=cluster")
    for words in (tried, listed):
        answer = login.ask(*words)
    return answer.strip() == settings.NAME


def start_controller(login: Machine) -> None:
    """Starts slurmctld."""
    login.serve("slurmctld", "slurmctld", "-D")
    wait_for(lambda: "UP" in login.ask("scontrol", "ping"), "slurmctld", 30)


def start_node(node: Machine, base: Path) -> None:
    """Starts slurmd on a node."""
    stepd = str(base / "sbin/slurmstepd")
    node.serve(f"slurmd-{node.name}", "slurmd", "-D", "-N", node.name, "-d", stepd)


def tails(base: Path, lines: int = 8) -> str:
    """The last lines of all daemons' output."""
    files = sorted([*(base / "log").iterdir(), *(base / "munge").glob("log")]) if (base / "log").is_dir() else []
    texts = [(file.name, file.read_text(errors="replace").splitlines()[-lines:]) for file in files]
    return "\n".join(line for name, text in texts if text for line in (f"--- {name}", *text))
