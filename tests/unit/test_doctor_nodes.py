"""What `dtrain doctor --nodes` makes of what it saw: each fault is named, with its node."""

from __future__ import annotations

import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import UsageError
from dtrain.launch.env.ports import listen_on
from dtrain.launch.nodes.handshake import prove
from dtrain.launch.nodes.wire import Wire
from dtrain.tools.doctor.finding import Finding, State
from dtrain.tools.doctor.nodes.cluster_report import ClusterReport
from dtrain.tools.doctor.nodes.echo import Echo, Peer, reach
from dtrain.tools.doctor.nodes.fitting import fit_together
from dtrain.tools.doctor.nodes.followers import NodeConnections
from dtrain.tools.doctor.nodes.host import ended_tasks
from dtrain.tools.doctor.nodes.job import DoctorJob, checked_options, chosen, script_text
from dtrain.tools.doctor.nodes.verdict import judge, merged, table
from dtrain.tools.doctor.pairing import best_pairs, rounds_of_pairs, slowest

NODES = ["n1", "n2", "n3"]
WELL = Finding("cores", "pass", "4 usable")


def seen(**more: Any) -> ClusterReport:
    """Three nodes that are all well."""
    versions = {"python": "3.11", "dtrain": "0.1, code a", "torch": "2.13"}
    facts = {"versions": versions, "visible": 0, "models": "", "trouble": "", "cores": 4}
    way = {"by": "name", "seconds": 0.001, "error": ""}
    well = ClusterReport(
        NODES,
        facts={node: {"node": node, **facts} for node in NODES},
        skew=dict.fromkeys(NODES, (0.0, 0.0001)),
        files={node: {"error": "", "token": node, "speed": 1e8, "sync": 1e-3} for node in NODES},
        read={node: dict.fromkeys([*NODES, ".host"], 0.01) for node in NODES},
        locks=dict.fromkeys(NODES, "held"),
        reach={node: {peer: dict(way) for peer in NODES if peer != node} for node in NODES},
        machine={node: [dict(vars(WELL))] for node in NODES},
        joined=list(NODES),
        ranks=1,
        measured={
            "torch": {"torch": "2.13", "cuda": "", "hip": "", "nccl": "", "gloo": True, "gpus": 0, "threads": 1},
            "reduces": [{"backend": "gloo", "bytes": 1 << 24, "wrong": [], "speed": 1e9, "latency": 1e-4}],
            "ranks": [[number, node, "cpu", 5e10 + number, True] for number, node in enumerate(NODES)],
            "pairs": [[0, 1, 1.0e9], [0, 2, 1.1e9], [1, 2, 1.2e9]],
        },
    )
    return replace(well, **more)


def states(found: list[Finding]) -> dict[str, State]:
    return {one.name: one.state for one in found if one.state in ("warn", "fail")}


def test_nodes_that_are_well() -> None:
    found = judge(seen(), "runs")
    assert states(found) == {}
    assert [one.measured for one in found if one.name == "cores"] == ["n1: 4 usable; n2, n3 likewise"]
    rows = table(seen())
    assert [row[0] for row in rows] == ["node", *NODES]
    assert len({len(row) for row in rows}) == 1


def broken(field: str, *path: object, value: object) -> ClusterReport:
    """Three nodes, of which one is not well: in one place something else was seen."""
    made = seen()
    place: Any = getattr(made, field)
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("what", "name", "state", "words"),
    [
        (broken("lost", "n2", value="ranks (the connection was closed)"), "nodes", "fail", "n2 was lost during: ranks"),
        (broken("facts", "n3", "versions", value={"torch": "2.9"}), "same versions", "fail", "n3 has .*torch 2.9; the others"),
        (broken("facts", "n3", "models", value="8 x H100"), "same GPUs", "warn", "none on n1, n2; 8 x H100 on n3"),
        (broken("skew", "n2", value=(-5.0, 0.1)), "clocks", "warn", "n2 is -5.0 s from n1"),
        (broken("skew", "n2", value=(-5.0, 4.5)), "clocks", None, "within 9.5 s"),
        (broken("files", "n2", "error", value="no space left"), "shared folder", "fail", "n2 cannot write there: no space"),
        (broken("read", "n2", ".host", value=None), "shared folder", "fail", "n2 does not see files that others write"),
        (broken("read", "n2", "n3", value=None), "shared folder", "fail", "n2 does not see the files of n3"),
        (broken("read", "n2", "n3", value=4.0), "shared folder", None, "within 4 s"),
        (broken("locks", "n2", value="taken"), "shared locks", "warn", "n2 got a lock that another machine holds"),
        (broken("reach", "n1", "n3", value={"by": "", "seconds": None, "error": "timed out"}), "names and ports", "fail", r"n1 cannot reach n3 \(timed out"),
        (broken("reach", "n1", "n3", value={"by": "address", "seconds": 1, "error": "no such name"}), "names and ports", "warn", "n3: no such name"),
        (broken("measured", "reduces", 0, "wrong", value=[2]), "all-reduce", "fail", "wrong sums on rank 2"),
        (broken("measured", "ranks", 1, 3, value=1e10), "slowest node", "warn", "n2: 10 GFLOP/s per rank, 20% of"),
        (broken("measured", "pairs", value=[[0, 1, 1e8], [0, 2, 1e9], [1, 2, 1.2e8]]), "slowest network", "warn", "n2: 120 MB/s"),
        (seen(measured=None, trouble="n1: it broke"), "all-reduce", "fail", "not measured: n1: it broke"),
        (seen(left_out={"n9": "it is odd"}), "all-reduce", "warn", "n9 did not take part: it is odd"),
    ],
)  # fmt: skip
def test_a_fault_is_named(what: ClusterReport, name: str, state: State | None, words: str) -> None:
    found = judge(what, "runs")
    assert states(found) == ({} if state is None else {name: state})
    (one,) = [one for one in found if one.name == name]
    assert re.search(words, one.measured), one
    assert bool(one.remedy) == (state is not None)
    table(what)


def test_a_node_that_does_not_come_is_named() -> None:
    facts = {node: one for node, one in seen().facts.items() if node != "n3"}
    what = seen(facts=facts, absent={"n3": "execve(): No such file"}, joined=["n1", "n2"])
    found = judge(what, "runs")
    assert "2 of 3 nodes started: n1, n2; n3 did not start: execve(): No such file" in found[0].measured
    assert [row[1] for row in table(what)] == ["came", "yes", "yes", "no"]
    nobody = ClusterReport(NODES, absent=dict.fromkeys(NODES, "no word"))
    assert states(judge(nobody, "runs")) == {"nodes": "fail"}


def test_a_check_that_is_not_well_on_some_nodes_is_told_for_those() -> None:
    ill = Finding("cores", "warn", "1 usable", "request more")
    found = merged({"n1": [vars(WELL)], "n2": [vars(ill)], "n3": [vars(ill)]})
    assert found == [Finding("cores", "warn", "n2: 1 usable; n3 likewise", "request more")]


def test_nodes_that_cannot_take_part_are_left_out() -> None:
    cut = {"by": "", "seconds": None, "error": "timed out"}
    assert fit_together(seen()) == (NODES, {})
    assert fit_together(broken("facts", "n2", "versions", value={"torch": "2.9"}))[0] == ["n1", "n3"]
    joined, out = fit_together(broken("reach", "n2", "n3", value=cut))
    assert (joined, out) == (["n1", "n2"], {"n3": "it and n2 cannot reach each other"})
    alone = broken("reach", "n1", value={"n2": cut, "n3": cut})
    assert fit_together(alone)[0] == ["n2", "n3"]
    assert fit_together(seen(lost={"n1": "read (no response)"}))[0] == ["n2", "n3"]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 9])
def test_pairs(nodes: int) -> None:
    rounds = rounds_of_pairs(nodes)
    pairs = [pair for one in rounds for pair in one]
    assert len(set(pairs)) == len(pairs)
    for one in rounds:
        assert len({node for pair in one for node in pair}) == 2 * len(one) == nodes - nodes % 2
    slow = nodes - 1
    timed = [(*pair, 1.0 if slow in pair else 10.0) for pair in pairs]
    expected = None if nodes == 2 else (slow, 0.1)
    assert slowest(best_pairs(timed)) == (expected if nodes != 3 else (2, 0.1))


def test_what_is_given_to_sbatch(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's $(touch x)"
    text = script_text(DoctorJob(2, ["-n", "3"], [], 1.0), folder)
    assert text.startswith("#!/bin/bash\n")
    assert text.endswith(f"doctor -n 3 --nodes 2 --into '{tmp_path}/a folder'\"'\"'s $(touch x)'\n")
    assert checked_options(["--exclude=n7"]) == ["--exclude=n7"]
    for word in ("job.sh", "--", "-x", "--a=\nb"):
        with pytest.raises(UsageError, match="should be a long sbatch option"):
            checked_options([word])
    assert chosen(("n1", "n2"), 1) == ("n1",)
    with pytest.raises(UsageError, match=r"--nodes 3, but this shell is in an allocation .* of 2: n1, n2"):
        chosen(("n1", "n2"), 3)


def test_a_node_is_reached_by_its_name_or_its_address_and_a_wrong_one_is_told() -> None:
    echo = Echo("localhost", "word")
    try:
        way = reach(Peer("localhost", echo.port, "127.0.0.1"), "word")
        assert (way["by"], way["error"]) == ("name", "")
        other = reach(Peer("no-such-host.invalid", echo.port, "127.0.0.1"), "word")
        assert other["by"] == ""  # what answers there is another node
        assert "no-such-host.invalid: " in other["error"]
        assert "127.0.0.1 is localhost" in other["error"]
        assert reach(Peer("localhost", echo.port, "127.0.0.1"), "another word")["by"] == ""
    finally:
        echo.close()
    assert not echo._server.is_alive()


def test_a_node_that_is_silent_or_gone_is_lost_and_strangers_are_not_met() -> None:
    listener = listen_on("127.0.0.1", port := free())
    followers = NodeConnections(listener, b"word")
    wires = [Wire(socket.create_connection(("127.0.0.1", port))) for _ in range(4)]
    came: dict[str, Any] = {}
    gathering = threading.Thread(target=lambda: came.update(followers.gather(NODES, 5, lambda _: False)))
    gathering.start()
    known = [prove(wire, key, 5) for wire, key in zip(wires, (b"word", b"word", b"other", b"word"), strict=True)]
    assert known == [True, True, False, True]
    for node, wire in zip((*NODES[:2], "n3", "n1"), wires, strict=True):  # the last one takes another's name
        wire.send({"hello": {"node": node}})
    gathering.join()
    assert {node: facts["address"] for node, facts in came.items()} == {"n1": "127.0.0.1", "n2": "127.0.0.1"}
    wires[1].close()
    began = time.monotonic()
    assert followers.ask("clock", seconds=0.3) == {}
    assert time.monotonic() - began < 30
    assert followers.lost["n1"] == "clock (no answer within 0.3 s)"
    assert followers.lost["n2"].startswith("clock (")
    assert followers.ask("clock", seconds=30) == {}, "the lost ones are not asked again"
    followers.close()
    for wire in wires:
        wire.close()


def test_tasks_that_have_ended_are_not_waited_for() -> None:
    said = ["1: srun: error: no", "srun: error: n2: task 1: Exited with exit code 2", "srun: job 3 has been allocated"]
    assert ended_tasks(said) == {1}
    assert ended_tasks(["srun: error: n[3-5,8]: tasks 2-4,7: Killed"]) == {2, 3, 4, 7}


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
