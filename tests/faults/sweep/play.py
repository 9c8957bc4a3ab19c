"""Plays one case: starts what it needs, lets the fault happen, and waits for the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.sweep.judge import MARK, Verdict, judge_failure, judge_screen, judge_time, wait_for_end
from faults.sweep.table import DTRAIN, EPOCHS, SRUN, TORCHRUN, Case
from helpers.cluster import Cluster, Plan, cluster, missing, need
from helpers.commands import BIN, clean_environment, popen
from helpers.hosts import Host, two_hosts

from dtrain.rundir.history import read_history

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "faults.py"
_START_SECONDS, _END_SECONDS = 120.0, 60.0
_FOREIGN = (
    "import socket\ns = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    "while True:\n    c, _ = s.accept(); c.sendall(b'220 a foreign service\\r\\n')\n"
)
# A rank that has another training as a subprocess.
_RANK = (
    "import subprocess, sys\nfrom dtrain.launch.env.inherited import joined, mark_rank\nmark_rank()\n"
    "sys.exit(subprocess.run(sys.argv[1:]).returncode)\n"
)
_cluster: list[Cluster] = []


@contextlib.contextmanager
def cluster_for_srun(under: Sequence[str]) -> Iterator[None]:
    """Has a cluster up for what is started by its srun."""
    if SRUN not in under:
        yield
        return
    need(missing())
    with cluster(Plan(nodes=1)) as made:
        _cluster.append(made)
        yield
        _cluster.clear()


class Stage:
    """The folder, the mark and the processes of one case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.token = case, folder, secrets.token_hex(8)
        self.mark = folder / "mark"
        self.verdict = Verdict(case)

    def start(
        self,
        *words: object,
        folder: Path | None = None,
        host: Host | None = None,
        stdout: int | None = None,
        before: Sequence[str] = (),
        **env: str,
    ) -> Screened:
        """Starts `dtrain WORDS`, by the words `before` it, with its output on the screen or in a pipe."""
        folder = folder or self.folder
        argv = [*before, str(BIN / "dtrain"), *map(str, words)]
        env |= {MARK: self.token}
        with (folder / "screen.txt").open("w") as output:
            if host is not None:
                return Screened(host.start(*words, output=output, **env), folder)
            environment = clean_environment(**env)
            process = popen(
                argv,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=output if stdout is None else stdout,
                text=True,
            )
        return Screened(process, folder)

    def train(self, *words: object, stdout: int | None = None, **env: str) -> Screened:
        """Starts `dtrain train WORDS` on as many ranks as the case has, by the launcher that it has."""
        ranks = self.case.ranks
        if self.case.under == DTRAIN:
            return self.start(*words, "-n", ranks, "--cpu", stdout=stdout, **env)
        env |= {MARK: self.token, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if self.case.under == TORCHRUN:
            launch = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "-m", "dtrain"]
            environment = clean_environment(**env)
        else:
            (slurm,) = _cluster
            launch = slurm.login.entered(
                "srun",
                f"--ntasks={ranks}",
                f"--job-name={self.token}",
                str(BIN / "dtrain"),
                processes=False,
                cwd=self.folder,
            )
            environment = slurm.environment(**env)
        with (self.folder / "screen.txt").open("w") as output:
            process = subprocess.Popen(
                [*launch, *map(str, words), "--cpu"],
                **{"cwd": self.folder, "env": environment, "stdin": subprocess.DEVNULL, "text": True},
                **{"stdout": output, "stderr": output},
            )
        return Screened(process, self.folder)

    def send(self, name: str, one: Screened) -> None:
        """Sends the launcher a signal as its user would; srun itself answers SIGTERM by killing its ranks."""
        if self.case.under == SRUN and name != "SIGKILL":
            (slurm,) = _cluster
            slurm.told("scancel", f"--signal={name.removeprefix('SIG')}", f"--name={self.token}")
        else:
            one.process.send_signal(signal.Signals[name])

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
            "output": _output,
            "inherited": _inherited,
        }[case.kind.how](stage)


def _check_code(stage: Stage, one: Screened, expected: int) -> None:
    code = one.code()
    # Other launchers end with a code of their own where a rank does not end with 0.
    right = code == expected if expected <= 0 or stage.case.under == DTRAIN else code not in (0, None)
    stage.verdict.check(right, f"exit code {code}, should be {expected}")


def _train(stage: Stage, does: str, *more: object) -> list[object]:
    case = stage.case
    if does == "worker":
        fault = [f"data.bad={case.first_sample() + 1}", "data.fault=sleep", f"data.mark={stage.mark}"]
    else:
        fault = [f"model.fault={does}", f"model.mark={stage.mark}"]
    return ["train", RECIPE, *fault, *case.words(), *more]


def _recipe(stage: Stage) -> Verdict:
    one = stage.train(*_train(stage, str(stage.case.place["does"])))
    since = stage.await_mark(one)
    verdict = stage.finish(since, one)
    _check_code(stage, one, stage.case.kind.code)
    judge_failure(verdict, stage.folder / "runs/it")
    return verdict


def _healthy(stage: Stage) -> Verdict:
    env = {}
    if stage.case.fault == "long TMPDIR":
        (stage.folder / ("t" * 100)).mkdir()
        env = {"TMPDIR": str(stage.folder / ("t" * 100))}
    one = stage.train(*_train(stage, str(stage.case.place["does"]), "hang_seconds=5"), **env)
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
    one = stage.train(*_train(stage, "go on", "epochs=100000"))
    stage.await_mark(one)
    since = time.time()
    stage.send(str(stage.case.place["does"]), one)
    verdict = stage.finish(since, one)
    _check_code(stage, one, stage.case.kind.code)
    return verdict


def _complete(stage: Stage) -> None:
    """Looks whether the run came to its end, with all its rows."""
    rows = len(read_history(stage.folder / "runs/it")) if (stage.folder / "runs/it/history.csv").exists() else 0
    stage.verdict.check(rows == EPOCHS, f"the history has {rows} rows of {EPOCHS}")


def _output(stage: Stage) -> Verdict:
    """Whoever reads the output goes, at the place of the fault or before a Ctrl-C."""
    ctrl_c = stage.case.place["does"] == "SIGINT"
    reading, writing = os.pipe()
    try:
        one = stage.train(*_train(stage, "go on", *(["epochs=100000"] if ctrl_c else [])), stdout=writing)
    finally:
        os.close(writing)
    reader = threading.Thread(target=_read_until, args=(reading, stage.mark, one), daemon=True)
    reader.start()  # else a full pipe would hold the run up
    stage.await_mark(one)
    reader.join()
    os.close(reading)
    since = time.time()
    if ctrl_c:
        one.process.send_signal(signal.SIGINT)
    verdict = stage.finish(since, one)
    _check_code(stage, one, stage.case.kind.code)
    log = stage.folder / "runs/it/logs/rank-0.log"
    if ctrl_c:  # after which there may have been nothing to write
        saved = list((stage.folder / "runs/it/checkpoints").glob("epoch-*"))
        verdict.check(bool(saved), "there is no checkpoint")
    else:
        verdict.check(log.exists() and "cannot be written" in log.read_text(), "the run's log does not say so")
        _complete(stage)
    return verdict


def _read_until(file: int, mark: Path, one: Screened) -> None:
    while not mark.exists() and one.process.poll() is None:
        if select.select([file], [], [], 0.01)[0] and not os.read(file, 65536):
            return


def _inherited(stage: Stage) -> Verdict:
    """A rank of another job starts the training as a subprocess, which is no rank of that job."""
    before = (sys.executable, "-c", _RANK)
    words = [*_train(stage, "go on"), "-n", stage.case.ranks, "--cpu"]
    since = time.time()
    one = stage.start(*words, before=before, **_rank_variables(1, 3, 1))
    verdict = stage.finish(since, one)
    verdict.seconds = 0.0  # it is a whole run
    _check_code(stage, one, 0)
    _complete(stage)
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
