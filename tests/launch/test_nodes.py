"""`dtrain launch` over two virtual hosts: one world, one history; and when one part ends, all end."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from helpers.commands import Dtrain
from helpers.hosts import Host, missing, two_hosts
from helpers.sweep import some

from dtrain import read_history

WITHIN = 15  # seconds for all nodes to end
PORT = 29511


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    lack = missing()
    if lack:
        pytest.skip(lack)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with two_hosts(tmp_path) as made:
        yield made


def start(
    hosts: list[Host], *words: object, ranks: int = 1, options: tuple[object, ...] = ()
) -> list[subprocess.Popen[str]]:
    """The same command on both hosts."""
    rdzv = f"{hosts[0].address}:{PORT}"
    return [
        host.start(
            "launch", "-n", ranks, "--nodes", 2, "--node-rank", node, "--rdzv", rdzv, "--cpu", *options, "--", *words
        )
        for node, host in enumerate(hosts)
    ]


def ended(launchers: list[subprocess.Popen[str]], timeout: float = 90) -> list[str]:
    """What each launcher printed, once it has ended; a launcher that has not is killed, and is a failure."""
    try:
        return [launcher.communicate(timeout=timeout)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.communicate()


def test_two_nodes_of_two_ranks_train_as_four_ranks_here(dtrain: Dtrain, hosts: list[Host], recipes: Path) -> None:
    words = ("train", recipes / "small.py", "epochs=2", "run.name=r")
    launchers = start(hosts, *words, ranks=2)
    texts = ended(launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    assert "EPOCH = 2" in texts[0]
    assert "EPOCH" not in texts[1], "rank 0 alone speaks"
    done = dtrain(*words, "-n", 4, "--cpu")
    assert done.code == 0, done.text
    assert not (hosts[1].folder / "runs").exists(), "rank 0 alone writes"
    timed = ["seconds", "samples_per_second"]
    frames = [read_history(folder / "runs" / "r").drop(columns=timed) for folder in (hosts[0].folder, dtrain.folder)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-9)


def test_nodes_without_numbers_are_numbered_as_they_come(hosts: list[Host]) -> None:
    for host in hosts:
        (host.folder / "s.py").write_text("import os\nprint('rank', os.environ['RANK'])")
    words = ("launch", "-n", 1, "--nodes", 2, "--rdzv", f"{hosts[0].address}:{PORT}", "--", "s.py")
    launchers = [host.start(*words, DTRAIN_RDZV_SECRET="a" * 32) for host in reversed(hosts)]  # the first comes last
    assert ended(launchers) == ["rank 1\n", "rank 0\n"]
    assert [launcher.returncode for launcher in launchers] == [0, 0]


STEPPING = """
import os, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
while True:
    dist.all_reduce(torch.ones(1))
    pathlib.Path("here-" + os.environ["RANK"]).touch()
"""


def at_work(hosts: list[Host], text: str, **more: object) -> list[subprocess.Popen[str]]:
    """Both nodes' launchers, once their ranks are at work."""
    for host in hosts:
        (host.folder / "s.py").write_text(text)
    launchers = start(hosts, "s.py", **more)
    deadline = time.monotonic() + 60
    while not all((host.folder / f"here-{node}").exists() for node, host in enumerate(hosts)):
        if time.monotonic() > deadline or any(launcher.poll() is not None for launcher in launchers):
            raise AssertionError(ended(launchers, 1))
        time.sleep(0.05)
    return launchers


@pytest.mark.parametrize(
    ("node", "number"),
    some(
        [(1, signal.SIGTERM), (0, signal.SIGKILL), (1, signal.SIGKILL)],
        [(0, signal.SIGTERM), (0, signal.SIGINT), (1, signal.SIGINT)],
    ),
)
def test_a_launcher_that_is_stopped_ends_every_node(hosts: list[Host], node: int, number: signal.Signals) -> None:
    launchers = at_work(
        hosts, "import pathlib, os, time\npathlib.Path('here-' + os.environ['RANK']).touch()\ntime.sleep(600)"
    )
    launchers[node].send_signal(number)
    texts = ended(launchers, WITHIN)
    codes = [launcher.returncode for launcher in launchers]
    assert codes[node] == (-9 if number == signal.SIGKILL else 128 + number)
    assert codes[1 - node] > 0
    told = "is lost" if number == signal.SIGKILL else f"on node {node}: dtrain: stopped by {number.name}"
    assert told in texts[1 - node]


def test_a_cut_network_ends_every_node(hosts: list[Host]) -> None:
    launchers = at_work(hosts, STEPPING)
    hosts[1].cut()
    texts = ended(launchers, WITHIN)
    assert all(launcher.returncode > 0 for launcher in launchers)
    for node, text in enumerate(texts):
        assert f"node {1 - node} is lost" in text


def test_a_rank_that_fails_on_one_node_ends_the_other_with_its_words(hosts: list[Host]) -> None:
    launchers = at_work(
        hosts,
        "import os, pathlib, time\nhere = 'here-' + os.environ['RANK']\npathlib.Path(here).touch()\n"
        "while pathlib.Path(here).exists():\n    time.sleep(0.05)\nraise ValueError('a fault')",
    )
    (hosts[1].folder / "here-1").unlink()
    texts = ended(launchers, WITHIN)
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert "on node 1: Traceback" in texts[0]
    for text in texts:
        assert re.search(r"ValueError: a fault\n[\s\S]*raised by your code\n  at rank 1", text)


def test_a_node_that_never_comes_is_named(hosts: list[Host]) -> None:
    rdzv = f"{hosts[0].address}:{PORT}"
    told = {0: "node 1 of 2 (ranks 2 to 3) did not reach", 1: "node 0 of 2 (ranks 0 to 1) did not start"}
    for node, host in enumerate(hosts):
        began = time.monotonic()
        launcher = host.start(
            "launch", "-n", 2, "--nodes", 2, "--node-rank", node, "--rdzv", rdzv, "--rdzv-timeout", 2, "train"
        )
        (text,) = ended([launcher])
        assert launcher.returncode == 2
        assert told[node] in text
        assert "--rdzv-timeout" in text
        assert time.monotonic() - began < 60  # the usual limit is 120 s


def test_a_script_that_differs_is_refused_on_both(hosts: list[Host]) -> None:
    for node, host in enumerate(hosts):
        (host.folder / "s.py").write_text(f"print({node})")
    launchers = start(hosts, "s.py")
    for launcher, text in zip(launchers, ended(launchers), strict=True):
        assert launcher.returncode == 2
        assert re.search(
            r"the content of s.py is not the same on all nodes: \w{12} on node 0, \w{12} on node 1\.", text
        )


def test_a_request_to_one_launcher_stops_all_nodes_ranks_with_one_checkpoint(hosts: list[Host], recipes: Path) -> None:
    launchers = start(hosts, "train", recipes / "long.py", "epochs=1000", "run.name=r")
    deadline = time.monotonic() + 60
    while not all((host.folder / f"train-{node}").exists() for node, host in enumerate(hosts)):
        assert time.monotonic() < deadline, ended(launchers, 1)
        time.sleep(0.05)
    launchers[1].send_signal(signal.SIGTERM)
    texts = ended(launchers, 60)
    assert [launcher.returncode for launcher in launchers] == [75, 75], texts
    for text in texts:
        assert "dtrain: stopped on request (SIGTERM), in epoch" in text
    assert not (hosts[0].folder / "runs/r/failure.json").exists()


def test_all_nodes_start_again_after_a_failure(hosts: list[Host], recipes: Path) -> None:
    fault = ["model.fault=raise", "model.rank=1", "model.epoch=2", "model.step=2"]
    words = ["train", recipes / "faults.py", "epochs=2", "asynchronous=false", *fault]
    launchers = start(hosts, *words, options=("--retries", 1))
    texts = ended(launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    for text in texts:
        assert "dtrain: attempt 1 failed; retrying in 1 s." in text
    (folder,) = (hosts[0].folder / "runs").iterdir()
    assert [line.split(",")[0] for line in (folder / "history.csv").read_text().splitlines()] == ["epoch", "1", "2"]
