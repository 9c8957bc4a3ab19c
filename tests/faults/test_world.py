"""Ranks and nodes that do not belong together are refused before the first step, on all sides and by name."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import BIN, Done, Dtrain, clean_environment

from dtrain.launch.env.ports import free_port


@contextlib.contextmanager
def running(folder: Path, *words: object, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [BIN / "dtrain", *map(str, words)],
        cwd=folder,
        env=clean_environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str]) -> Done:
    text, _ = process.communicate(timeout=120)
    return Done(process.returncode, text, "")


SECRET = "the nodes of these tests know it"  # noqa: S105


def rank_variables(rank: int, port: int, size: int = 2, **more: str) -> dict[str, str]:
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DTRAIN_RDZV_TIMEOUT": "30"} | more


def two_ranks(folders: list[Path], words: list[list[object]], variables: list[dict[str, str]]) -> list[Done]:
    with (
        running(folders[0], *words[0], **variables[0]) as first,
        running(folders[1], *words[1], **variables[1]) as second,
    ):
        return [finished(first), finished(second)]


STRANGERS = {
    "config": ("epochs=2", {}, r"config train.epochs is not the same on all ranks: 1 on rank 0 \(.*\), another one on rank 1"),
    "job": ("epochs=1", {"DTRAIN_JOB": "b"}, r"the job is not the same on all ranks: a on rank 0 \(.*\), another one on rank 1"),
    "size": ("epochs=1", {"WORLD_SIZE": "3"}, r"the number of ranks is not the same on all ranks: 2 on rank 0"),
    "rank": ("epochs=1", {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, r"are both rank 0\. Give each node"),
    "recipe": ("epochs=1", {}, r"the content of mine.py is not the same on all ranks: \w{12} on rank 0 \(.*\), \w{12} on"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGERS)
def test_ranks_that_differ_are_refused_on_every_rank(tmp_path: Path, recipes: Path, what: str) -> None:
    word, more, told = STRANGERS[what]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "mine.py").write_text((recipes / "small.py").read_text())
    if what == "recipe":
        (folders[1] / "mine.py").write_text("MORE = 1\n" + (recipes / "small.py").read_text())
    port = free_port()
    variables = [rank_variables(0, port, DTRAIN_JOB="a"), rank_variables(1, port, **({"DTRAIN_JOB": "a"} | more))]
    words: list[list[object]] = [["train", "mine.py", "--cpu", last] for last in ("epochs=1", word)]
    done = two_ranks(folders, words, variables)
    assert [one.code for one in done] == [2, 2], done
    assert re.search(told, done[0].text), done[0].text
    assert "step" not in done[0].text.replace("--", "").partition("error")[0], "it began"
    assert not any((folder / "runs").exists() for folder in folders)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come_is_named_in_time(dtrain: Dtrain, rank: int) -> None:
    began = time.monotonic()
    done = dtrain("train", "--cpu", **rank_variables(rank, free_port(), DTRAIN_RDZV_TIMEOUT="2"))
    assert done.code == 2, done.text
    told = ("rank 1 of 2 did not connect within 2 s", "rank 1 did not find rank 0 at 127.0.0.1:")
    assert told[rank] in done.err
    assert time.monotonic() - began < 100  # the usual limit is 120 s


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A foreign process that holds a port and answers every connection with a line that is no dtrain's."""
    code = (
        "import socket\ns = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "while True:\n    c, _ = s.accept(); c.sendall(b'220 a foreign service\\r\\n')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def test_a_busy_port_is_named_with_its_holder_before_anything_starts(
    dtrain: Dtrain, holder: tuple[subprocess.Popen[str], int]
) -> None:
    process, port = holder
    rdzv = f"127.0.0.1:{port}"
    several = ("--nodes", 2, "--node-rank", 0, "--rdzv", rdzv)
    for options, env in (((*several,), {}), (("--rdzv", rdzv), {}), ((), {"MASTER_PORT": str(port)})):
        done = dtrain("launch", "-n", 2, *options, "train", timeout=100, **env)
        assert done.code == 2, done.text
        assert f"port {port} is in use by process {process.pid} ({sys.executable}" in done.err


def test_a_foreign_service_on_the_port_is_told_from_a_launcher(
    dtrain: Dtrain, holder: tuple[subprocess.Popen[str], int]
) -> None:
    rdzv = f"127.0.0.1:{holder[1]}"
    done = dtrain("launch", "--nodes", 2, "--node-rank", 1, "--rdzv", rdzv, "train", timeout=100)
    assert done.code == 2
    assert f"what listens at {rdzv} is not a dtrain launcher: it answered b'220 a foreign service" in done.err


def node(
    folder: Path, number: int, port: int, *more: object, nodes: int = 2
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    (folder / "s.py").write_text("import os\nprint('rank', os.environ['RANK'], os.environ['MASTER_ADDR'])")
    place = ("--nodes", nodes, "--node-rank", number, "--rdzv", f"127.0.0.1:{port}", "--rdzv-timeout", 20)
    return running(folder, "launch", "-n", 1, *place, *more, "--", "s.py", DTRAIN_RDZV_SECRET=SECRET)


def connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_garbage_and_another_jobs_node_do_not_disturb_a_job(tmp_path: Path) -> None:
    port = free_port("")
    with node(tmp_path, 0, port) as first, connected(port) as foreign, connected(port) as silent:
        foreign.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with node(tmp_path, 1, port, "--job-id", "other") as stranger:
            refused = finished(stranger)
        assert refused.code == 2
        told = (
            f"--rdzv and --job-id is not the same on all nodes: 127.0.0.1:{port} on node 0, 127.0.0.1:{port} other on"
        )
        assert told in refused.text
        with node(tmp_path, 1, port) as second:
            done = [finished(first), finished(second)]
        assert silent.fileno() >= 0
    assert [one.code for one in done] == [0, 0], done
    warned, said = done[0].text.splitlines()
    assert warned.startswith("dtrain: warning: a connection from 127.0.0.1 to the launchers' port was dropped: it sent")
    assert [said, done[1].text] == ["rank 0 127.0.0.1", "rank 1 127.0.0.1\n"]


def test_two_nodes_with_one_node_rank_are_refused(tmp_path: Path) -> None:
    port = free_port("")
    with (
        node(tmp_path, 0, port, nodes=3) as first,
        node(tmp_path, 1, port, nodes=3) as second,
        node(tmp_path, 1, port, nodes=3) as third,
    ):
        done = [finished(one) for one in (first, second, third)]
    for one in done:
        assert one.code == 2
        assert "a second launcher joined" in one.text
        assert "as node 1. Give each node its own --node-rank, 0 to 2" in one.text


def test_nodes_number_themselves_in_order_of_arrival(tmp_path: Path) -> None:
    port = free_port("")
    (tmp_path / "s.py").write_text("import os\nprint('rank', os.environ['RANK'], os.environ['NODE_RANK'])")
    words = ("launch", "-n", 1, "--nodes", 3, "--rdzv", f"127.0.0.1:{port}", "--", "s.py")
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(running(tmp_path, *words, DTRAIN_RDZV_SECRET=SECRET)) for _ in range(3)]
        done = [finished(one) for one in started]
    assert [one.code for one in done] == [0, 0, 0], done
    assert sorted(one.text for one in done) == [f"rank {number} {number}\n" for number in range(3)]


def test_a_numbered_node_among_others_without_numbers_is_refused(tmp_path: Path) -> None:
    port = free_port("")
    (tmp_path / "s.py").write_text("")
    words = ("launch", "-n", 1, "--nodes", 2, "--rdzv", f"127.0.0.1:{port}")
    with running(tmp_path, *words, "s.py") as first:
        connected(port).close()
        with running(tmp_path, *words, "--node-rank", 1, "s.py") as second:
            done = [finished(one) for one in (first, second)]
    for one in done:
        assert one.code == 2
        assert "--node-rank is not the same on all nodes: not given on node 0, given on node 1" in one.text


def test_garbage_is_named_where_a_node_does_not_come(tmp_path: Path) -> None:
    port = free_port("")
    with node(tmp_path, 0, port, "--rdzv-timeout", 3) as first, connected(port) as foreign:
        foreign.sendall(b"GET / HTTP/1.1\r\n\r\n")
        done = finished(first)
    assert done.code == 2
    assert "node 1 of 2 (ranks 1 to 1) did not reach" in done.text
    assert "Dropped connections: 127.0.0.1 sent b'GET / HTTP/1.1" in done.text


ASKED = {
    "no such place": (["--nodes", "2", "--rdzv", "no.such.invalid:1"], "no such host"),
    "node rank": (
        ["--nodes", "2", "--node-rank", "2", "--rdzv", "h:1"],
        "--node-rank 2 of --nodes 2: should be 0 to 1",
    ),
    "no place": (["--nodes", "2", "--node-rank", "1"], "several nodes need --rdzv HOST:PORT"),
    "no port": (["--nodes", "2", "--node-rank", "1", "--rdzv", "h"], "--rdzv h: should be HOST:PORT"),
    "no host": (["--nodes", "2", "--node-rank", "1", "--rdzv", "no.such.invalid:1"], "no such host"),
    "no nodes": (["--node-rank", "1"], "--node-rank 1 needs --nodes"),
}


@pytest.mark.parametrize("case", ASKED)
def test_options_that_do_not_fit_are_refused_with_the_remedy(dtrain: Dtrain, case: str) -> None:
    options, told = ASKED[case]
    done = dtrain("launch", *options, "train", timeout=100)
    assert done.code == 2, done.text
    assert told in done.err


def test_dry_run_shows_each_nodes_ranks_and_starts_nothing(dtrain: Dtrain) -> None:
    done = dtrain(
        "launch", "-n", 2, "--nodes", 2, "--node-rank", 1, "--rdzv", "127.0.0.1:29500", "--dry-run", "train", "epochs=1"
    )
    assert done.code == 0, done.text
    assert "node 1 (this one): ranks 2 to 3" in done.out
    assert re.search(
        r"  rank 3: .*RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 NODE_RANK=1 MASTER_ADDR=127.0.0.1", done.out
    )
    assert re.search(r"each rank runs: \S+ \S+__main__.py train epochs=1\n", done.out)
    assert list(dtrain.folder.iterdir()) == []
