"""Nodes whose own name leads astray, with IPv6 alone, or with several interfaces: gloo takes the one between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hosts import Host, missing, two_hosts

SCRIPT = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print("sum", total.item(), "by", os.environ["GLOO_SOCKET_IFNAME"], flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    lack = missing()
    if lack:
        pytest.skip(lack)


def launched(hosts: list[Host], rdzv: str, *words: str, **env: str) -> tuple[list[int], list[str]]:
    """Runs a command, by default the script, on both hosts; returns exit codes and output."""
    for host in hosts:
        (host.folder / "s.py").write_text(SCRIPT)
    command = words or ("s.py",)
    started = [
        host.start(
            *("launch", "-n", 1, "--nodes", 2, "--node-rank", node, "--rdzv", f"{rdzv}:29511", "--cpu", "--", *command),
            **env,
        )
        for node, host in enumerate(hosts)
    ]
    try:
        texts = [one.communicate(timeout=100)[0] for one in started]
    finally:
        for one in started:
            one.kill()
            one.communicate()
    return [one.returncode for one in started], texts


@pytest.mark.parametrize("what", ["debian", "ipv6"])
def test_ranks_meet_by_the_interface_between_their_nodes(tmp_path: Path, what: str) -> None:
    """Debian's /etc/hosts: the first node's name leads to 127.0.1.1 there, and to its address on the other node."""
    names = ("127.0.0.1 localhost\n127.0.1.1 first\n", "127.0.0.1 localhost\n10.213.77.1 first\n")
    with two_hosts(tmp_path, names=names if what == "debian" else ("", ""), ipv6=what == "ipv6", more=True) as hosts:
        codes, texts = launched(hosts, "first" if what == "debian" else f"[{hosts[0].address}]")
    assert codes == [0, 0], texts
    assert [text.splitlines()[-1] for text in texts] == ["sum 2.0 by eth0"] * 2, texts


def test_a_run_whose_first_node_has_debians_name_trains(tmp_path: Path, recipes: Path) -> None:
    names = ("127.0.0.1 localhost\n127.0.1.1 first\n", "127.0.0.1 localhost\n10.213.77.1 first\n")
    with two_hosts(tmp_path, names=names) as hosts:
        codes, texts = launched(hosts, "first", "train", str(recipes / "small.py"), "epochs=1", "run.name=r")
    assert codes == [0, 0], texts
    assert (tmp_path / "node0/runs/r/history.csv").is_file()


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("GLOO_SOCKET_IFNAME", "nope9", "there is no such interface"),
        ("NCCL_SOCKET_IFNAME", "lo", "this interface leads to no other node"),
    ],
)
def test_an_interface_that_leads_to_no_other_node_is_refused(
    tmp_path: Path, variable: str, value: str, why: str
) -> None:
    with two_hosts(tmp_path) as hosts:
        codes, texts = launched(hosts, hosts[0].address, **{variable: value})
    assert codes == [2, 2], texts
    has = "This machine has lo (127.0.0.1, ::1), eth0 (10.213.77.2"
    assert f"{variable}={value}: {why}. {has}" in texts[1]
    assert f"Set {variable}=eth0, which leads to 10.213.77.1, or unset it." in texts[1]
