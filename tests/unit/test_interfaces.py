"""Which interface has an address, and which names of interfaces are refused between several nodes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dtrain.errors import WorldError
from dtrain.launch.env import interfaces
from dtrain.launch.env.interfaces import check_interfaces, interface_to, interface_with
from dtrain.launch.env.job import Job


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two networks; the second has IPv6 alone."""
    table = tmp_path / "if_inet6"
    table.write_text(
        "00000000000000000000000000000001 01 80 10 80 lo\n"
        "fd770000000000000000000000000002 03 40 00 80 ib0\n"
        "fe80000000000000000000000000000a 03 40 20 80 ib0\n"
    )
    monkeypatch.setattr(interfaces, "_IF_INET6", table)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"], "ib0": []}
    monkeypatch.setattr(interfaces, "_ipv4", lambda name: list(addresses[name]))
    monkeypatch.setattr(interfaces.sys, "platform", "linux")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.5", "eth0"),
        ("::ffff:10.0.0.5", "eth0"),
        ("fd77::2", "ib0"),
        ("fe80::a%ib0", "ib0"),
        ("10.0.0.6", None),
        ("127.0.0.1", None),
        ("127.0.1.1", None),
        ("::1", None),
        ("not-an-address", None),
    ],
)
def test_an_address_has_its_interface(network: None, address: str, name: str | None) -> None:
    assert interface_with(address) == name


def test_several_nodes_are_never_given_the_loopback_interface(network: None) -> None:
    variable = "GLOO_SOCKET_IFNAME"
    assert Job(1).defaults()[variable] == "lo"
    for own in ("127.0.0.1", "127.0.1.1", "::1", ""):
        assert variable not in Job(1, nodes=2, host="127.0.0.1", own_address=own).defaults()
    assert Job(1, nodes=2, host="127.0.1.1", own_address="10.0.0.5").defaults()[variable] == "eth0"


def test_the_way_to_this_machine_is_no_interface_to_others() -> None:
    assert interface_to("127.0.0.1") is None
    assert interface_to("no-such-host.invalid") is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"GLOO_SOCKET_IFNAME": "eth0"},
        {"GLOO_SOCKET_IFNAME": "eth0,ib0"},
        {"NCCL_SOCKET_IFNAME": "eth,ib"},
        {"NCCL_SOCKET_IFNAME": "=eth0"},
        {"NCCL_SOCKET_IFNAME": "^lo,docker"},
        {"NCCL_SOCKET_IFNAME": "en,eth"},
    ],
)
def test_interfaces_that_are_there_are_taken(network: None, environ: dict[str, str]) -> None:
    check_interfaces(environ, "10.0.0.9")


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME=eth: there is no such interface"),
        ({"GLOO_SOCKET_IFNAME": "eth0,eth9"}, "GLOO_SOCKET_IFNAME=eth0,eth9: there is no such interface"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth: there is no such interface"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, "GLOO_SOCKET_IFNAME=lo: this interface leads to no other node"),
        ({"NCCL_SOCKET_IFNAME": "lo"}, "NCCL_SOCKET_IFNAME=lo: this interface leads to no other node"),
    ],
)
def test_others_are_refused_with_what_is_there(network: None, environ: dict[str, str], why: str) -> None:
    with pytest.raises(WorldError) as caught:
        check_interfaces(environ, "no-such-host.invalid")
    assert str(caught.value).startswith(why)
    assert "This machine has lo (127.0.0.1, ::1), eth0 (10.0.0.5), ib0 (fd77::2, fe80::a)." in str(caught.value)
    assert str(caught.value).endswith(f"Unset {next(iter(environ))}.")


def test_launchers_on_one_machine_may_use_its_loopback(network: None) -> None:
    check_interfaces({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1")
