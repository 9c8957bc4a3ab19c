"""Boots virtual machines, runs commands on them and turns them off."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helpers.cluster.needs import SPACES, program
from helpers.cluster.settings import LOGIN, address

_FIRST_PROCESS = Path(__file__).with_name("machine.py")
_SHARED = ("--net", "--uts", "--ipc", "--mount")
_BOOT_SECONDS, _END_SECONDS = 60.0, 30.0


def started(pid: int) -> str | None:
    """When a process was started, in ticks: with its id it names one process for good. None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def run(*argv: str) -> str:
    """Runs a command of the system's that has to succeed, and returns what it printed."""
    done = subprocess.run([program(argv[0]), *argv[1:]], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


@dataclass
class Machine:
    """A virtual machine that is on.

    Attributes:
        name: its host name.
        process: what holds it; the machine is off when this has ended.
        pid: its first process, by the real machine's numbers.
        since: when that was started.
        log: the folder of its programs' output.
        environment: that of its daemons.
        daemons: what was started on it for good.
    """

    name: str
    process: subprocess.Popen[bytes]
    pid: int
    since: str | None
    log: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def entered(self, *argv: str, processes: bool, cwd: Path | None = None) -> list[str]:
        """Returns a command line as run on this machine.

        Args:
            argv: the command.
            processes: whether it becomes one of the machine's own processes, which end with it; else it keeps the
                process id with which it is started.
            cwd: its folder, which is the same on all machines.
        """
        where = [] if cwd is None else [f"--wd={cwd}"]
        own = ["--pid"] if processes else []
        return [program("nsenter"), "-t", str(self.pid), *_SHARED, *own, *where, "--", *argv]

    def serve(self, name: str, *argv: str, **environment: str) -> None:
        """Starts a daemon, which ends with the machine."""
        with (self.log / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                self.entered(program(argv[0]), *argv[1:], processes=True),
                cwd="/",
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def ask(self, *argv: str, seconds: float = 60) -> str:
        """What a command prints here; nothing where it fails."""
        done = subprocess.run(
            self.entered(program(argv[0]), *argv[1:], processes=False),
            check=False,
            cwd="/",
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        return done.stdout if done.returncode == 0 else ""

    def off(self) -> None:
        """Ends the machine at once, with all that runs on it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            if self.since is not None and started(self.pid) == self.since:
                os.kill(self.pid, signal.SIGKILL)
            self.process.wait(_END_SECONDS)
        for daemon in self.daemons.values():
            daemon.wait(_END_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()


def boot_login(base: Path, environment: dict[str, str]) -> Machine:
    """Boots the login node, in whose network and process space all other machines will be."""
    return _boot([], LOGIN, base, environment)


def boot_node(login: Machine, name: str, base: Path) -> Machine:
    """Boots a node and plugs its network cable into the login node's switch."""
    return _boot(login.entered(processes=True), name, base, login.environment, login)


def _boot(
    inside: Sequence[str], name: str, base: Path, environment: dict[str, str], login: Machine | None = None
) -> Machine:
    facts = {"name": name, "address": address(name), "etc": "" if login else str(base / "etc")}
    log = base / "log"
    with (log / f"machine-{name}.out").open("ab") as errors:
        process = subprocess.Popen(
            [*inside, program("unshare"), *SPACES, sys.executable, "-IS", str(_FIRST_PROCESS), json.dumps(facts)],
            cwd="/",
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    pid = int(_line(process, log, name))
    machine = Machine(name, process, pid, started(pid), log, environment)
    try:
        if login is not None:
            _plug(login, machine)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        told = _line(process, log, name)
        assert told == "ready", told
    except BaseException:
        machine.off()
        raise
    return machine


def _line(process: subprocess.Popen[bytes], log: Path, name: str) -> str:
    """The next line that a machine's first process prints."""
    assert process.stdout is not None
    deadline, text = time.monotonic() + _BOOT_SECONDS, b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, left))
        part = os.read(process.stdout.fileno(), 1) if ready else b""
        if not part:
            process.kill()
            process.communicate()
            raise AssertionError(f"{name} does not boot: {(log / f'machine-{name}.out').read_text()}")
        text += part
    return text.decode().strip()


def _plug(login: Machine, machine: Machine) -> None:
    """A cable with a fixed address of its card: after a power cycle the others still know it."""
    hardware = f"02:77:00:00:00:{int(machine.name[1:]):02x}"
    cable = f"v-{machine.name}"
    card = ("peer", "name", "eth0", "address", hardware, "netns", str(machine.pid))
    network(login, "link", "add", cable, "type", "veth", *card)
    network(login, "link", "set", cable, "master", "br0", "up")


def unplug(login: Machine, name: str) -> None:
    """Takes a node's cable away for good, where the kernel has not yet done so."""
    if f"v-{name}@" in network(login, "-o", "link", "show"):
        with contextlib.suppress(AssertionError):  # it may go of itself meanwhile
            network(login, "link", "del", f"v-{name}")


def network(login: Machine, *words: str) -> str:
    """Runs ip(8) where all cables end."""
    return run("nsenter", f"--net=/proc/{login.pid}/ns/net", program("ip"), *words)
