"""Network interfaces: which one leads to the other nodes, and whether gloo and NCCL were told of another one."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

from dtrain.errors import WorldError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_IF_INET6 = Path("/proc/net/if_inet6")
_SIOCGIFADDR = 0x8915
_LOOPBACK = "lo"
_PORT = 9  # of a datagram socket that sends nothing


def interfaces() -> dict[str, list[str]]:
    """Returns this machine's interfaces with their addresses, IPv4 first; empty elsewhere than on Linux."""
    if sys.platform != "linux":
        return {}
    found = {name: _ipv4(name) for _, name in socket.if_nameindex()}
    try:
        rows = [line.split() for line in _IF_INET6.read_text().splitlines()]
    except OSError:  # without IPv6
        rows = []
    for digits, *_, name in rows:
        found.setdefault(name, []).append(str(ipaddress.IPv6Address(int(digits, 16))))
    return found


def interface_with(address: str) -> str | None:
    """Returns the interface that has an address of this machine's ("eth0").

    Args:
        address: as a socket tells it; an IPv6 address may name its zone ("fe80::1%eth0").

    Returns:
        the name; None where there is none, as for the loopback interface, which leads to no other machine.
    """
    try:
        wanted = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(wanted, ipaddress.IPv6Address) and wanted.ipv4_mapped is not None:
        wanted = wanted.ipv4_mapped
    there = interfaces()
    return None if wanted.is_loopback else next((name for name, has in there.items() if str(wanted) in has), None)


def interface_to(host: str) -> str | None:
    """Returns the interface by which this machine's packets to a host leave; None as for `interface_with`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, _PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # nothing is sent
            return interface_with(str(probe.getsockname()[0]))
    except (OSError, UnicodeError):
        return None


def check_interfaces(environ: Mapping[str, str], host: str) -> None:
    """Looks at the interfaces that gloo and NCCL were told to use between several nodes, before either starts.

    Args:
        environ: with `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME`, where somebody set them.
        host: the first node's name or address.

    Raises:
        WorldError: there is no such interface, or it leads to no other node.
    """
    there = interfaces()
    for variable in (GLOO, NCCL):
        value = environ.get(variable, "")
        named = [name.strip() for name in value.lstrip("=").split(",") if name.strip()]
        if not there or not named or value.startswith("^"):
            continue
        exact = variable == GLOO or value.startswith("=")
        found = {one for one in there for name in named if one == name or (not exact and one.startswith(name))}
        if not found or (exact and not found.issuperset(named)):
            why = "there is no such interface"
        elif found == {_LOOPBACK} and not is_loopback(host):
            why = "this interface leads to no other node"
        else:
            continue
        way = interface_to(host)
        known = ", ".join(f"{name} ({', '.join(has) or 'no address'})" for name, has in there.items())
        remedy = f"Set {variable}={way}, which leads to {host}, or unset it." if way else f"Unset {variable}."
        raise WorldError(f"{variable}={value}: {why}. This machine has {known}. {remedy}")


def is_loopback(host: str) -> bool:
    """Whether a host is given by an address of the loopback interface, or as localhost: all are on one machine then."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ipv4(interface: str) -> list[str]:
    """Returns an interface's IPv4 address; see netdevice(7)."""
    if sys.platform != "linux":
        return []
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return []
    return [socket.inet_ntoa(answer[20:24])]
