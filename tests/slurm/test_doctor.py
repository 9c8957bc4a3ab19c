"""`dtrain doctor --nodes` on a real SLURM: what is wrong with a node is found, and the node named."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import Cluster
from helpers.cluster.settings import address

import dtrain

_PACKAGE = Path(dtrain.__file__).parent


def findings(told: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in told["findings"]}


@contextlib.contextmanager
def on_node(slurm: Cluster, name: str, does: tuple[object, ...], undoes: tuple[object, ...]) -> Iterator[None]:
    done = slurm.on(name, *does, cwd=slurm.base)
    assert done.code == 0, done.text
    try:
        yield
    finally:
        slurm.on(name, *undoes, cwd=slurm.base)


def test_nodes_that_are_well_but_for_a_slow_network(slurm: Cluster, tmp_path: Path) -> None:
    slow = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "300mbit", "burst", "256kb", "latency", "50ms")
    with on_node(slurm, "n3", slow, ("tc", "qdisc", "del", "dev", "eth0", "root")):
        done = slurm.dtrain("doctor", "--nodes", 3, "--json", cwd=tmp_path, timeout=120)
    told = json.loads(done.out)
    found = findings(told)
    assert done.code == 0, done.text
    for name in ("nodes", "same versions", "clocks", "shared folder", "shared locks", "names and ports", "SLURM task"):
        assert found[name]["state"] == "pass", found[name]
    assert "gloo, 3 ranks: correct, " in found["all-reduce"]["measured"]
    assert found["all-reduce"]["measured"].endswith("on n1, n2, n3")
    assert found["slowest network"]["measured"].startswith("n3: "), found["slowest network"]
    assert found["slowest network"]["state"] == "warn"
    seen = [(node["node"], node["came"], node["folder"], node["reaches"]) for node in told["nodes"]]
    assert seen == [(name, "yes", "yes", "2 of 2") for name in ("n1", "n2", "n3")]
    assert list((tmp_path / "runs").iterdir()) == []


def test_nodes_that_are_not_well_are_named(slurm: Cluster, tmp_path: Path) -> None:
    other, runs = tmp_path / "other", tmp_path / "runs"
    shutil.copytree(_PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "errors.py").write_text((other / "errors.py").read_text() + "# another version\n")
    runs.mkdir()
    away = ("blackhole", f"{address('n3')}/32")
    with (
        on_node(slurm, "n2", ("mount", "--bind", other, _PACKAGE), ("umount", _PACKAGE)),
        on_node(slurm, "n3", ("mount", "-t", "tmpfs", "none", runs), ("umount", runs)),
        on_node(slurm, "n4", ("ip", "route", "add", *away), ("ip", "route", "del", *away)),
    ):
        done = slurm.dtrain("doctor", "--nodes", 4, "--json", cwd=tmp_path, timeout=180)
    found = findings(json.loads(done.out))
    assert done.code == 1, done.text
    assert found["nodes"]["state"] == "pass"
    assert "n2 has dtrain" in found["same versions"]["measured"]
    assert "n3 does not see files that others write there" in found["shared folder"]["measured"]
    for pair in ("n3 cannot reach n4", "n4 cannot reach n3"):
        assert pair in found["names and ports"]["measured"]
    assert {name: one["state"] for name, one in found.items() if one["state"] == "fail"} == dict.fromkeys(
        ("same versions", "shared folder", "names and ports"), "fail"
    )
    reduce = found["all-reduce"]["measured"]
    assert "gloo, 2 ranks: correct, " in reduce, "the nodes that fit together are measured all the same"
    assert "on n1, n3; n2 did not take part: not the others' dtrain; n4 did not take part: it and n3 cannot" in reduce


@pytest.mark.parametrize("fault", ["too many", "no python"])
def test_a_job_or_a_node_that_does_not_come(slurm: Cluster, tmp_path: Path, fault: str) -> None:
    if fault == "too many":
        done = slurm.dtrain("doctor", "--nodes", 9, cwd=tmp_path, timeout=120)
        assert "did not start (pending: PartitionNodeLimit) and was cancelled" in done.out
    else:
        python = Path(shutil.which("python3", path=slurm.environment()["PATH"]) or "").parent
        with on_node(slurm, "n2", ("mount", "-t", "tmpfs", "none", python), ("umount", python)):
            done = slurm.dtrain("doctor", "--nodes", 2, cwd=tmp_path, timeout=120)
        assert "1 of 2 nodes started: n1; n2 did not start: " in done.out
        assert "No such file or directory" in done.out
    assert done.code == 1, done.text
    assert set(slurm.queue().values()) <= {"COMPLETING"}
    assert list((tmp_path / "runs").iterdir()) == []
