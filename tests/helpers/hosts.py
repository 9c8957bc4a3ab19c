"""Virtual hosts: network namespaces with an address and a host name of their own, joined by a cable that can be cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from helpers.commands import BIN, clean_environment

_PAIRS = itertools.count()


def missing() -> str | None:
    """What this machine lacks for virtual hosts, in words; None where they can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if lacking:
        return f"the command {lacking[0]} is missing (apt-get install iproute2 util-linux)"
    probe = f"dtp{os.getpid()}"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError:
        return "this kernel or container allows no network namespaces"
    _ip("netns", "del", probe)
    return None


def _ip(*words: str) -> None:
    subprocess.run([shutil.which("ip") or "ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """One virtual host."""

    name: str
    address: str
    folder: Path

    def start(self, *words: object, output: IO[str] | int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
        """Starts `dtrain WORDS` there; the process is dtrain itself."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return subprocess.Popen(
            [shutil.which("ip") or "ip", "netns", "exec", self.name, *inside, str(BIN / "dtrain"), *map(str, words)],
            cwd=self.folder,
            env=clean_environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def cut(self) -> None:
        """Takes its network away."""
        _ip("-n", self.name, "link", "set", "eth0", "down")


@contextlib.contextmanager
def two_hosts(
    folder: Path, *, names: tuple[str, str] = ("", ""), ipv6: bool = False, more: bool = False
) -> Iterator[list[Host]]:
    """Makes two hosts that see each other and nothing else, each with a folder of its own.

    Args:
        folder: where those are made.
        names: of each host the lines of its own /etc/hosts; empty for that of this machine.
        ipv6: they have IPv6 addresses alone.
        more: each has another interface besides, aside0, with an address that leads nowhere.
    """
    hosts: list[Host] = []
    pair = next(_PAIRS)  # several may be there at once; each pair sees itself alone
    try:
        for number in (0, 1):
            address = f"fd77::{number + 1}" if ipv6 else f"10.213.77.{number + 1}"
            host = Host(f"dtn{pair}-{number}-{os.getpid()}", address, folder / f"node{number}")
            host.folder.mkdir()
            _ip("netns", "add", host.name)
            hosts.append(host)
            _ip("-n", host.name, "link", "set", "lo", "up")
            if names[number]:  # ip-netns(8) puts it in the place of /etc/hosts there
                _own_files(host).mkdir(parents=True)
                (_own_files(host) / "hosts").write_text(names[number])
            if more:
                _ip("-n", host.name, "link", "add", "aside0", "type", "veth", "peer", "name", "aside1")
                _ip("-n", host.name, "addr", "add", f"10.9.{number}.1/24", "dev", "aside0")
                _ip("-n", host.name, "link", "set", "aside0", "up")
        first, second = (host.name for host in hosts)
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host in hosts:
            size = ["/64", "nodad"] if ipv6 else ["/24"]
            _ip("-n", host.name, "addr", "add", f"{host.address}{size[0]}", "dev", "eth0", *size[1:])
            _ip("-n", host.name, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            _ip("netns", "del", host.name)
            shutil.rmtree(_own_files(host), ignore_errors=True)


def _own_files(host: Host) -> Path:
    return Path("/etc/netns") / host.name
