"""Plays one case: starts what it needs, lets the fault happen, and waits for the end."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faults.sweep.judge import MARK, Verdict, judge_failure, judge_screen, judge_time, wait_for_end
from faults.sweep.table import Case
from helpers.commands import BIN, clean_environment
from helpers.hosts import Host, two_hosts

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "faults.py"
_START_SECONDS, _END_SECONDS = 120.0, 60.0
_FOREIGN = (
    "import socket\ns = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    "while True:\n    c, _ = s.accept(); c.sendall(b'220 a foreign service\\r\\n')\n"
)


class Stage:
    """The folder, the mark and the processes of one case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.token = case, folder, secrets.token_hex(8)
        self.mark = folder / "mark"
        self.verdict = Verdict(case)

    def start(self, *words: object, folder: Path | None = None, host: Host | None = None, **env: str) -> Screened:
        folder = folder or self.folder
        argv = [str(BIN / "dtrain"), *map(str, words)]
        env |= {MARK: self.token}
        with (folder / "screen.txt").open("w") as output:
            if host is not None:
                return Screened(host.start(*words, output=output, **env), folder)
            environment = clean_environment(**env)
            process = subprocess.Popen(
                argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True
            )
        return Screened(process, folder)

    def await_mark(self, *processes: Screened) -> float:
        """When the place of the fault was reached; now, where that did not happen."""
        deadline = time.time() + _START_SECONDS
        while not self.mark.exists():
            if time.time() > deadline or any(one.process.poll() is not None for one in processes):
                self.verdict.check(self.mark.exists(), "the place of the fault was never reached")
                break
            time.sleep(0.01)
        return float(self.mark.read_text()) if self.mark.exists() else time.time()

    def finish(self, since: float, *processes: Screened, more: dict[str, object] | None = None) -> Verdict:
        """Waits for the end and judges all but failure.json."""
        deadline = time.time() + _END_SECONDS
        for one in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, deadline - time.time()))
        wait_for_end(self.token, self.verdict, since)
        judge_screen(self.verdict, [one.text() for one in processes], more)
        judge_time(self.verdict)
        return self.verdict


class Screened:
    """A launcher whose output goes to a file in its folder."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self._file = process, folder / "screen.txt"

    def text(self) -> str:
        return self._file.read_text(errors="replace")

    def code(self) -> int | None:
        return self.process.poll()


def play(case: Case) -> Verdict:
    """Plays a case and judges it."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        stage = Stage(case, Path(name))
        return {
            "recipe": _recipe,
            "launcher": _launcher,
            "nodes": _nodes,
            "spread": _spread,
            "meeting": _meeting,
            "healthy": _healthy,
        }[case.kind.how](stage)


def _check_code(stage: Stage, one: Screened, expected: int) -> None:
    stage.verdict.check(one.code() == expected, f"exit code {one.code()}, should be {expected}")


def _train(stage: Stage, does: str, *more: object) -> list[object]:
    case = stage.case
    if does == "worker":
        fault = [f"data.bad={case.first_sample() + 1}", "data.fault=sleep", f"data.mark={stage.mark}"]
    else:
        fault = [f"model.fault={does}", f"model.mark={stage.mark}"]
    return ["train", RECIPE, *fault, *case.words(), *more]


def _recipe(stage: Stage) -> Verdict:
    one = stage.start(*_train(stage, str(stage.case.place["does"])), "-n", stage.case.ranks, "--cpu")
    since = stage.await_mark(one)
    verdict = stage.finish(since, one)
    _check_code(stage, one, stage.case.kind.code)
    judge_failure(verdict, stage.folder / "runs/it")
    return verdict


def _healthy(stage: Stage) -> Verdict:
    words = _train(stage, str(stage.case.place["does"]), "hang_seconds=5", "-n", stage.case.ranks, "--cpu")
    one = stage.start(*words)
    with contextlib.suppress(subprocess.TimeoutExpired):
        one.process.wait(_START_SECONDS)
    wait_for_end(stage.token, stage.verdict, time.time())
    judge_screen(stage.verdict, [one.text()])
    _check_code(stage, one, 0)
    stage.verdict.check(stage.mark.exists(), "the place was never reached")
    stage.verdict.check(not (stage.folder / "runs/it/failure.json").exists(), "a failure.json is there")
    stage.verdict.check("dtrain: error" not in one.text(), "the screen tells of an error")
    return stage.verdict


def _launcher(stage: Stage) -> Verdict:
    one = stage.start(*_train(stage, "go on", "epochs=100000"), "-n", stage.case.ranks, "--cpu")
    stage.await_mark(one)
    since = time.time()
    one.process.send_signal(signal.Signals[str(stage.case.place["does"])])
    verdict = stage.finish(since, one)
    _check_code(stage, one, stage.case.kind.code)
    return verdict


def _on_both(stage: Stage, hosts: list[Host], words: list[object]) -> list[Screened]:
    launch = ("launch", "-n", stage.case.ranks // 2, "--nodes", 2, "--rdzv", f"{hosts[0].address}:29511", "--cpu")
    return [
        stage.start(*launch, "--node-rank", number, *words, folder=host.folder, host=host)
        for number, host in enumerate(hosts)
    ]


def _spread(stage: Stage) -> Verdict:
    """A rank's fault on one of two virtual hosts: both screens tell of it, and the run's folder on the first."""
    with two_hosts(stage.folder) as hosts:
        nodes = _on_both(stage, hosts, _train(stage, str(stage.case.place["does"])))
        verdict = stage.finish(stage.await_mark(*nodes), *nodes)
        for one in nodes:
            _check_code(stage, one, stage.case.kind.code)
        judge_failure(verdict, hosts[0].folder / "runs/it")
    return verdict


def _nodes(stage: Stage) -> Verdict:
    """Two virtual hosts; the fault is one node's, and the other one must know."""
    case, node = stage.case, int(str(stage.case.place["node"]))
    with two_hosts(stage.folder) as hosts:
        nodes = _on_both(stage, hosts, _train(stage, "go on", "epochs=100000"))
        stage.await_mark(*nodes)
        since = time.time()
        if case.place["does"] == "cut":
            hosts[node].cut()
            verdict = stage.finish(since, *nodes)
        else:
            nodes[node].process.kill()
            verdict = stage.finish(since, nodes[1 - node])
        for number, one in enumerate(nodes):
            killed = case.place["does"] != "cut" and number == node
            code = one.code()
            right = code == -signal.SIGKILL if killed else code is not None and code > 0
            verdict.check(right, f"node {number}: exit code {code}")
    return verdict


@contextlib.contextmanager
def _foreigner() -> Iterator[tuple[int, int]]:
    """The process id and the port of a process that answers each connection with a line of its own."""
    with subprocess.Popen([sys.executable, "-c", _FOREIGN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def _meeting(stage: Stage) -> Verdict:
    does = stage.case.place["does"]
    if does == "recipe":
        return _another_recipe(stage)
    with _foreigner() as (pid, port):
        since = time.time()
        rdzv = ("--rdzv", f"127.0.0.1:{port}", "--rdzv-timeout", 30)
        node = 0 if does == "port" else 1
        if stage.case.place["workers"] or stage.case.ranks == 2:  # a launcher, or a rank without one
            one = stage.start("launch", "-n", stage.case.ranks // 2, "--nodes", 2, "--node-rank", node, *rdzv, "train")
        else:
            rank = 0 if does == "port" else max(1, int(str(stage.case.place["rank"])))
            one = stage.start("train", "--cpu", **_rank_variables(rank, stage.case.ranks, port))
        verdict = stage.finish(since, one, more={"holder": pid})
        _check_code(stage, one, stage.case.kind.code)
        verdict.check(not (stage.folder / "runs").exists(), "it began")
    return verdict


def _rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "DTRAIN_RDZV_TIMEOUT": "30",
    }


def _another_recipe(stage: Stage) -> Verdict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    since, nodes = time.time(), []
    for number in (0, 1):
        folder = stage.folder / f"node{number}"
        folder.mkdir()
        other = f"MORE = {stage.case.seed}\n" if number == stage.case.place["node"] else ""
        (folder / "mine.py").write_text(other + RECIPE.read_text())
        launch = ("launch", "-n", stage.case.ranks // 2, "--nodes", 2, "--node-rank", number, "--cpu")
        nodes.append(stage.start(*launch, "--rdzv", f"127.0.0.1:{port}", "train", "mine.py", folder=folder))
    verdict = stage.finish(since, *nodes)
    for one in nodes:
        _check_code(stage, one, stage.case.kind.code)
    verdict.check(not any((stage.folder / f"node{n}" / "runs").exists() for n in (0, 1)), "it began")
    return verdict
