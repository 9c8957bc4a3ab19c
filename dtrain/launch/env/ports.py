"""TCP ports: a free one, and who holds one that is not."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import random
import re
import socket
import sys
from pathlib import Path

from dtrain.errors import WorldError

_PROC = Path("/proc")
_BACKLOG = 1024  # connections that wait to be taken; a launcher looks every few hundredths of a second
_FIRST_QUIET, _LAST_QUIET = 20_000, 32_000  # below those that Linux gives out by itself
_LISTENS = "0A"  # the state's code in /proc/net/tcp


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port that is free on this machine now; for all its addresses with host=""."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def quiet_port() -> int:
    """Returns a port that is free on this machine, and that Linux gives nobody by itself: another process will use it.

    It is drawn, so that two jobs that look at the same moment hardly find the same one.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(_FIRST_QUIET, _LAST_QUIET)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    return free_port("")


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
        return socket.create_server(("", port), family=family_of(host), backlog=_BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise WorldError(f"port {port} cannot be opened: {error.strerror}. Choose another one.") from None
        raise PortBusyError(
            f"port {port} is in use{holder_of(port)}. Choose another port, the "
            "same on every node, or stop that process."
        ) from None


def is_literal(host: str) -> bool:
    """Whether a host is given by its IP address, not by a name that may mean another one elsewhere."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def bound_to(host: str, port: int) -> socket.socket | None:
    """Returns a socket that listens on the address of a host's name alone; None where that is not this machine's own.

    Args:
        host: the name or address.
        port: 1 to 65535.

    Raises:
        PortBusyError: another process listens there.
    """
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortBusyError(f"port {port} is in use{holder_of(port)}. Choose another one.") from None
    return None


def listen_at(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an IP address that was given, or for a name, which may mean several, on all.

    Raises:
        PortBusyError: another process listens there.
        WorldError: it is not allowed.
    """
    bound = None
    with contextlib.suppress(PortBusyError):  # raised below, with its remedy
        bound = bound_to(host, port) if is_literal(host) else None
    return bound or listen_on(host, port)


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
            f"--rdzv {host}: no such host ({error}). Use the first node's name or address, the same on every node."
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


def is_foreign(connection: socket.socket) -> bool:
    """Whether the other end of a connection is on this machine and belongs to another user, as far as can be known.

    Raises:
        OSError: as for `uid_of_peer`.
    """
    return uid_of_peer(connection) not in (None, 0, os.geteuid())


def uid_of_peer(connection: socket.socket) -> int | None:
    """Returns the user who has the other end of a connection within this machine; None where that cannot be known.

    Raises:
        OSError: the other end has reset the connection, as what looks for open ports does. Whose it was cannot be known
            any more, and what it sent can still be read: nobody is to take that for the user's own.
    """
    if connection.family != socket.AF_INET:
        return None
    mine, peer = (
        f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
        for host, port in (connection.getsockname(), connection.getpeername())
    )
    try:
        rows = [line.split() for line in (_PROC / "net" / "tcp").read_text().splitlines()[1:]]
    except OSError:  # not Linux
        return None
    return next((int(row[7]) for row in rows if (row[1], row[2]) == (peer, mine)), None)


def holder_of(port: int) -> str:
    """Returns " by process PID (COMMAND)" for the process that listens on a port, or why that cannot be told."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listeners(_PROC / "net" / table, port)}
    if not inodes:
        return ""
    for folder in _PROC.glob("[0-9]*"):
        if inodes & _sockets_of(folder):
            return f" by process {folder.name} ({_command_of(folder)})"
    return " by a process of another user"


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
