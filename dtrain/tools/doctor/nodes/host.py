"""The host: starts a task on each node with srun, and asks all of them, step by step."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from dtrain.launch.env.ports import free_port, listen_on
from dtrain.launch.nodes.secret import Secret, new_secret
from dtrain.launch.supervisor import dtrain_argv
from dtrain.tools.doctor.network import LateError, bounded
from dtrain.tools.doctor.nodes.cluster_report import Answer, ClusterReport, Plan
from dtrain.tools.doctor.nodes.followers import NodeConnections
from dtrain.tools.doctor.nodes.task import TOKEN

PATIENCE = 90.0  # for the nodes to come: Python on a busy file system takes its time
_SHORT, _FILES, _RANKS = 20.0, 60.0, 200.0
_PINGS = 5
_TALLY = re.compile(r"(\d+): (.*)")  # srun --label
_ENDED = re.compile(r"srun: error: \S+: tasks? ([\d,-]+): ")


class Tasks:
    """The srun that runs the nodes' tasks.

    Attributes:
        process: srun itself.
    """

    def __init__(self, plan: Plan, meet: list[str], secret: str) -> None:
        # A terminal's Ctrl-C is for this process, which then ends srun in its own time.
        self.process = subprocess.Popen(
            srun_argv(plan, meet),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: list[str] = []
        assert self.process.stdin is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(OSError), self.process.stdin as stdin:  # it may have ended already
            stdin.write(f"{secret}\n")  # srun hands it to every task; command lines are seen by all users of a machine
        assert self.process.stdout is not None  # noqa: S101 - for the type checker
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        self._lines.extend(line.rstrip() for line in stream)

    def over(self, missing: Sequence[int]) -> bool:
        """Whether these tasks have ended, as far as srun tells, or srun itself has."""
        return self.process.poll() is not None or set(missing) <= ended_tasks(self._lines)

    def words_of(self, task: int, node: str) -> str:
        """Returns the last thing that a node's task said, or srun of it; "" where neither said anything."""
        own, about = [], []
        for line in self._lines:
            match = _TALLY.fullmatch(line)
            if match and int(match[1]) == task:
                own.append(match[2].strip())
            elif not match and node in re.split(r"[\s:,\[\]]+", line):
                about.append(line)
        own = [line for line in own if line]
        return next(iter([*own[-1:], *about[-1:]]), "")

    @property
    def said(self) -> str:
        """The first thing that srun itself said."""
        return next((line for line in self._lines if not _TALLY.fullmatch(line)), "")

    def end(self) -> None:
        """Ends what still runs."""
        for stop in (None, self.process.terminate, self.process.kill):
            if stop is not None:
                stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
                break
        self._reader.join(1)


def ended_tasks(lines: Sequence[str]) -> set[int]:
    """Returns the tasks of which srun has said that they ended badly.

    Args:
        lines: such as "srun: error: n[2-3]: tasks 1-2: Exited with exit code 2".
    """
    found: set[int] = set()
    for match in map(_ENDED.match, lines):
        for part in match[1].split(",") if match else ():
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def srun_argv(plan: Plan, meet: list[str]) -> list[str]:
    """Returns the command that starts one task on each node of the allocation that this process is in."""
    count = len(plan.nodes)
    options = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(plan.nodes)}"]
    if "SLURM_CPUS_PER_TASK" in os.environ:  # srun has not inherited it since SLURM 22.05
        options.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
    # A node whose task fails is a finding; the others go on. --overlap: also beside an interactive step.
    options += ["--overlap", "--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--label", "--job-name=dtrain-doctor"]
    words = ["doctor-node", "--folder", str(plan.folder.absolute())]
    for place in meet:
        words += ["--meet", place]
    return ["srun", *options, sys.executable, *dtrain_argv(words)]


def examine(plan: Plan) -> ClusterReport:
    """Looks at all nodes of the plan.

    Args:
        plan: its folder is there, and this process may write in it.

    Returns:
        what was seen; a node that does not come, or goes, is no error.
    """
    seen = ClusterReport(list(plan.nodes))
    secret, port = new_secret(), free_port("")
    followers = NodeConnections(listen_on("127.0.0.1", port), Secret(secret.encode()).key("doctor"))
    tasks = Tasks(plan, [f"{host}:{port}" for host in own_names(plan.nodes)], secret)

    def over(came: Container[str]) -> bool:
        return tasks.over([number for number, node in enumerate(plan.nodes) if node not in came])

    try:
        with contextlib.closing(followers), _locked(plan.folder / "lock"):
            seen.facts = followers.gather(plan.nodes, PATIENCE, over)
            if seen.facts:
                _clocks(followers, seen)
                _files(followers, seen, plan.folder)
                _ports(followers, seen)
                _machines(followers, seen, plan)
                _all_reduce(followers, seen, plan)
            seen.lost = followers.lost
    finally:
        tasks.end()
    for number, node in enumerate(plan.nodes):
        if node not in seen.facts:
            seen.absent[node] = tasks.words_of(number, node) or tasks.said or f"no answer within {PATIENCE:g} s"
    return seen


def own_names(nodes: tuple[str, ...]) -> list[str]:
    """Returns what other nodes may find this machine by: its name, and its addresses on the way to them."""
    names = [socket.gethostname()]
    for node in nodes[:2]:
        with (
            contextlib.suppress(OSError, UnicodeError, LateError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        ):
            address = bounded(partial(socket.gethostbyname, node))
            probe.connect((address, 9))  # a datagram socket: nothing is sent
            names.append(probe.getsockname()[0])
    return list(dict.fromkeys(name for name in names if not name.startswith("127.")))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock that the nodes will try."""
    with path.open("wb") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the nodes will see
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _clocks(followers: NodeConnections, seen: ClusterReport) -> None:
    """Compares clocks: of several questions, the one that was answered soonest counts."""
    offsets: dict[str, tuple[float, float]] = {}
    for node in seen.present:
        best = (0.0, float("inf"))
        for _ in range(_PINGS):
            began = time.time()
            answer = followers.ask("clock", {node: {}}, seconds=_SHORT).get(node)
            ended = time.time()
            if answer is not None and (ended - began) / 2 < best[1]:
                best = (answer["now"] - (began + ended) / 2, (ended - began) / 2)
        if best[1] < float("inf"):
            offsets[node] = best
    first = next(iter(offsets.values()), (0.0, 0.0))
    seen.skew = {node: (offset - first[0], exact + first[1]) for node, (offset, exact) in offsets.items()}


def _files(followers: NodeConnections, seen: ClusterReport, folder: Path) -> None:
    """Every node writes a token into the folder, and reads those of all others and of this process."""
    own = secrets.token_hex(8)
    (folder / f"{TOKEN}.host").write_text(own)
    seen.files = followers.ask("write", seconds=_FILES)
    tokens = {node: one["token"] for node, one in seen.files.items() if not one["error"]} | {".host": own}
    more: dict[str, Answer] = {node: {"tokens": tokens} for node in seen.present}
    seen.read = {node: one["read"] for node, one in followers.ask("read", more, seconds=_FILES).items()}
    seen.locks = {node: one["lock"] for node, one in followers.ask("lock", seconds=_SHORT).items()}


def _ports(followers: NodeConnections, seen: ClusterReport) -> None:
    more: dict[str, Answer] = {}
    for node in seen.present:
        others = [seen.facts[other] for other in seen.present if other != node]
        more[node] = {"peers": [{key: one[key] for key in ("node", "port", "address")} for one in others]}
    # Each peer may take four waits, and sixteen are asked at once.
    seconds = _SHORT + 16 * (1 + len(more) // 16)
    seen.reach = {node: one["reach"] for node, one in followers.ask("reach", more, seconds=seconds).items()}


def _machines(followers: NodeConnections, seen: ClusterReport, plan: Plan) -> None:
    visible = [seen.facts[node]["visible"] for node in seen.present]
    seen.ranks = plan.ranks or (1 if plan.cpu else max(1, min(visible)))
    with_it = {"ranks": seen.ranks, "nodes": len(plan.nodes), "wandb": plan.wandb}
    more: dict[str, Answer] = dict.fromkeys(seen.present, with_it)
    seen.machine = {node: one["findings"] for node, one in followers.ask("machine", more, seconds=_FILES).items()}


def _all_reduce(followers: NodeConnections, seen: ClusterReport, plan: Plan) -> None:
    """Starts ranks on the nodes that fit together, and has them measure."""
    from dtrain.tools.doctor.nodes.fitting import fit_together

    seen.lost = followers.lost
    seen.joined, seen.left_out = fit_together(seen)
    if len(seen.joined) < 2:
        seen.trouble = "fewer than two compatible nodes are left"
        return
    first = seen.joined[0]
    port = followers.ask("port", {first: {}}, seconds=_SHORT).get(first)
    if port is None:
        seen.trouble = f"{first} is lost"
        return
    by_name = all(seen.reach[node][first]["by"] == "name" for node in seen.joined[1:])
    cpu = plan.cpu or any(seen.facts[node]["visible"] < seen.ranks for node in seen.joined)
    common = {
        "cpu": cpu,
        "ranks": seen.ranks,
        "nodes": len(seen.joined),
        "host": first if by_name else seen.facts[first]["address"],
        "rdzv_port": port["port"],
    }
    more: dict[str, Answer] = {node: {**common, "node_rank": rank} for rank, node in enumerate(seen.joined)}
    answers = followers.ask("ranks", more, seconds=_RANKS)
    bad = [f"{node}: {answers[node]['text']}" for node in seen.joined if node in answers and answers[node]["code"] != 0]
    seen.measured = answers.get(first, {}).get("measured") if not bad else None
    gone = [node for node in seen.joined if node not in answers]
    seen.trouble = bad[0] if bad else f"{', '.join(gone)} did not finish" if gone else ""
