"""TCP ports: a free one, and who holds one that is not."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from pathlib import Path

from dtrain.errors import WorldError

_PROC = Path("/proc")
_LISTENS = "0A"  # the state's code in /proc/net/tcp


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port that is free on this machine now; for all its addresses with host=""."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class PortBusyError(WorldError):
    """Another process listens on a port."""


def is_own_address(host: str) -> bool:
    """Whether a host's name or address is this machine's.

    Raises:
        WorldError: no such host.
    """
    family_of(host)
    for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((address[0], 0))  # to any port: only an address of one's own can be had
            return True
    return False


def listen_on(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on a port of all this machine's addresses.

    Args:
        host: the address that others will use; it decides between IPv4 and IPv6.
        port: 1 to 65535.

    Raises:
        PortBusyError: another process listens there, and who it is where that can be seen.
        WorldError: it is not allowed.
    """
    try:
        return socket.create_server(("", port), family=family_of(host))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise WorldError(f"port {port} cannot be listened on: {error.strerror}. Choose another one.") from None
        raise PortBusyError(
            f"port {port} is in use{holder_of(port)}. Choose another port, the same on every node, or end that process."
        ) from None


def check_free(port: int) -> None:
    """Raises a WorldError that names the holder where a port is in use."""
    listen_on("127.0.0.1", port).close()


def family_of(host: str) -> socket.AddressFamily:
    """Returns AF_INET or AF_INET6, whichever a host's name or address leads to first.

    Raises:
        WorldError: no such host.
    """
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise WorldError(
            f"--rdzv {host}: no such host ({error}). Give the first node's name or address, the same on every node."
        ) from None


def words_of(host: str, port: int) -> bytes | None:
    """Returns the first bytes of what a service says by itself; none where it waits; None where nothing listens."""
    try:
        with socket.create_connection((host, port), timeout=0.5) as connection:
            try:
                return connection.recv(60)
            except TimeoutError:
                return b""
    except OSError:
        return None


def holder_of(port: int) -> str:
    """Returns " by process PID (COMMAND)" for the process that listens on a port, or why that cannot be told."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listeners(_PROC / "net" / table, port)}
    if not inodes:
        return ""
    for folder in _PROC.glob("[0-9]*"):
        if inodes & _sockets_of(folder):
            return f" by process {folder.name} ({_command_of(folder)})"
    return " by a process that this user may not look into"


def _listeners(table: Path, port: int) -> set[str]:
    """Returns the inodes of the sockets that listen on a port; see proc_pid_net(5)."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:  # not Linux
        return set()
    return {row[9] for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port}


def _sockets_of(folder: Path) -> set[str]:
    found = set()
    try:
        for link in (folder / "fd").iterdir():
            match = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            found |= {match.group(1)} if match else set()
    except OSError:  # another user's, or it has just ended
        pass
    return found


def _command_of(folder: Path) -> str:
    try:
        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended by now"
    return " ".join(words).strip()[:200]
