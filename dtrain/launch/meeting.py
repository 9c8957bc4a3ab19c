"""The launchers of a job's nodes: they meet before any rank starts, and stay in touch until the job has ended.

::

    node 0: listens on the port that --rdzv names          node 1, 2, ...: connect, again and again
            "welcome", with the seconds that are left  ->
                                                       <-  "hello": which node, and what must be the same on all
            "refused", to all, where something differs ->
            "start", once all are there: store, nonce  ->
            how a part of the job ended               <->  how a part of the job ended
            "over", once every part ended well         ->

Without --node-rank, the node that has the address of --rdzv is node 0, and the others are numbered as they come.

A launcher that vanishes is noticed by its connection's end, or by keep-alive probes where the network is cut.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dtrain.errors import EXIT_FAILED, WorldError
from dtrain.launch.job import BY_ARRIVAL, Job
from dtrain.launch.ports import PortBusyError, family_of, free_port, is_own_address, listen_on
from dtrain.launch.postmortem import Failure
from dtrain.launch.wire import Wire

_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 1.0


class Stopped(Exception):  # noqa: N818 - no error: a signal came
    """A signal came while the launchers were still meeting."""


@dataclass(frozen=True)
class Word:
    """How one node's part of the job ended.

    Attributes:
        node: which node.
        exit_code: 0 where all its ranks ended well.
        text: what a person shall read of it; empty where it ended well, or because of another part.
        when: seconds since the epoch.
        lost: whether it is another node that says so, since this one is gone.
        failure: what `failure.json` shall hold of it; None where there is nothing.
        ended: rank -> how it ended, of this node's ranks.
    """

    node: int
    exit_code: int
    text: str
    when: float
    lost: bool = False
    failure: dict[str, Any] | None = None
    ended: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[bool, float]:
        """What comes first is the cause: what tells of nothing but another rank's end comes last."""
        return self.failure is not None and Failure(**self.failure).echo, self.when


class Meeting:
    """One node's launcher among the others; made by `meet`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._words: dict[int, Word] = {}

    def news(self) -> Word | None:
        """Returns how another node's part ended badly, once one has; never waits."""
        self._listen()
        # One without words was ended because of another, and tells how its ranks fared.
        bad = [word for word in self._words.values() if word.text and word.node != self.job.node_rank]
        return min(bad, key=lambda word: word.order, default=None)

    def ended(self, seconds: float) -> dict[str, str]:
        """Returns how ranks of the other nodes ended, as far as their launchers tell within some seconds."""
        deadline = time.monotonic() + seconds
        while len(self._words) < self.job.nodes and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self._listen()
        return {rank: how for word in self._words.values() for rank, how in word.ended.items()}

    def last_words(self, seconds: float = _LAST_WORDS_SECONDS) -> Word | None:
        """Waits a moment for what other nodes have to say, after this node's ranks failed; returns as `news`."""
        deadline = time.monotonic() + seconds
        while (word := self.news()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return word

    def tell(self, word: Word) -> None:
        """Tells the other nodes how this node's part ended."""
        self._words[word.node] = word
        self._send(word)

    def pass_on(self, word: Word) -> None:
        """Tells the other nodes what ended the job on one of them."""
        self._send(word)

    def over(self) -> bool:
        """Whether every node's part is known to have ended well; call it after `news`."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the connections."""
        raise NotImplementedError

    def _listen(self) -> None:
        raise NotImplementedError

    def _send(self, word: Word) -> None:
        raise NotImplementedError

    def _lose(self, node: int, why: str) -> None:
        """Notes that a node's launcher is gone without a word."""
        text = (
            f"dtrain: error: node {node} is lost ({why}): its launcher or its machine has ended, or the network is "
            "cut. Look at that node's own output."
        )
        ranks = range(node * self.job.ranks, (node + 1) * self.job.ranks)
        failure = asdict(Failure.of_lost_node(node, ranks))
        self._words.setdefault(node, Word(node, EXIT_FAILED, text, time.time(), lost=True, failure=failure))


class _Host(Meeting):
    """The first node's side."""

    def __init__(self, job: Job, about: Mapping[str, str], listener: socket.socket) -> None:
        super().__init__(job)
        self._about = about
        self._listener = listener
        self._waiting: list[Wire] = []
        self._nodes: dict[int, Wire] = {}
        self._strangers: list[str] = []
        self._deadline = time.monotonic() + job.timeout
        self._started = False

    def gather(self, stop: Sequence[int]) -> None:
        """Waits for all nodes and starts the job.

        Raises:
            WorldError: a node did not come in time, or differs; every node that came is told.
            Stopped: a signal came.
        """
        try:
            while len(self._nodes) < self.job.nodes - 1:
                if stop:
                    raise Stopped
                if time.monotonic() > self._deadline:
                    raise WorldError(self._missing())
                self._receive_guests(_POLL_SECONDS)
        except WorldError as error:
            for wire in self._nodes.values():
                wire.send({"refused": str(error)})
            raise
        self._started = True
        self.job = replace(self.job, port=free_port(""))
        for node, wire in self._nodes.items():
            wire.send({"start": {"port": self.job.port, "nonce": self.job.nonce, "node_rank": node}})

    def over(self) -> bool:
        ended = len(self._words) == self.job.nodes
        if ended:
            for wire in self._nodes.values():
                wire.send({"over": True})
        return ended

    def close(self) -> None:
        for wire in [*self._nodes.values(), *self._waiting]:
            wire.close()
        self._listener.close()

    def _listen(self) -> None:
        self._receive_guests(0.0)
        for node, wire in self._nodes.items():
            for message in wire.receive():
                if "ended" in message:
                    self._words[node] = Word(**message["ended"])
            if wire.lost is not None:
                self._lose(node, wire.lost)

    def _send(self, word: Word) -> None:
        for wire in self._nodes.values():
            wire.send({"ended": asdict(word)})

    def _receive_guests(self, seconds: float) -> None:
        readable, _, _ = select.select([self._listener], [], [], seconds)
        if readable:
            with contextlib.suppress(OSError):  # it has gone again
                wire = Wire(self._listener.accept()[0])
                wire.send({"welcome": max(0.0, self._deadline - time.monotonic())})
                self._waiting.append(wire)
        for wire in list(self._waiting):
            hello = next((message for message in wire.receive() if "hello" in message), None)
            if hello is not None or wire.lost is not None:
                self._waiting.remove(wire)
                self._meet(wire, hello)
        if not self._started:
            self._nodes = {node: wire for node, wire in self._nodes.items() if not wire.receive() and not wire.lost}

    def _meet(self, wire: Wire, hello: dict[str, Any] | None) -> None:
        if hello is None:
            self._strangers += [f"{wire.peer} sent {wire.strange!r}"] if wire.strange else []
            wire.close()
            return
        node, theirs = int(hello["node"]), dict(hello["hello"])
        if node == BY_ARRIVAL:
            node = next(number for number in range(1, self.job.nodes + 1) if number not in self._nodes)
        stranger = self._about["--rdzv and --job-id"] != theirs.get("--rdzv and --job-id")
        problem = _difference(self._about, theirs, node) or self._unfit(node)
        if problem is None:
            self._nodes[node] = wire
            return
        wire.send({"refused": problem})
        wire.close()
        if not stranger and not self._started:
            raise WorldError(problem)

    def _unfit(self, node: int) -> str | None:
        if self._started:
            return f"the job at {_place(self.job)} is running already, with all its {self.job.nodes} nodes."
        if node in self._nodes or not 0 < node < self.job.nodes:
            return (
                f"a second launcher came to {_place(self.job)} as node {node}. Give each node a --node-rank of its "
                f"own, 0 to {self.job.nodes - 1}; another job needs another port or --job-id."
            )
        return None

    def _missing(self) -> str:
        missing = [node for node in range(1, self.job.nodes) if node not in self._nodes]
        per_node = self.job.ranks
        ranks = ", ".join(f"{node * per_node} to {(node + 1) * per_node - 1}" for node in missing)
        strangers = f" Others came: {'; '.join(self._strangers[:3])}." if self._strangers else ""
        return (
            f"node {', '.join(map(str, missing))} of {self.job.nodes} (ranks {ranks}) did not come to "
            f"{_place(self.job)} within {self.job.timeout:g} s.{strangers} Start the same command there (with its own "
            "--node-rank, if you give them), see that this address can be reached from it, or allow more time: "
            "--rdzv-timeout."
        )


class _Guest(Meeting):
    """Any other node's side."""

    def __init__(self, job: Job, wire: Wire) -> None:
        super().__init__(job)
        self._wire = wire
        self._over = False

    def join(self, about: Mapping[str, str], stop: Sequence[int]) -> None:
        """Introduces this node and waits for the start; raises as `_Host.gather`."""
        self._wire.send({"hello": dict(about), "node": self.job.node_rank})
        deadline, welcomed = time.monotonic() + self.job.timeout, False
        while True:
            if stop:
                raise Stopped
            for message in self._wire.receive(_POLL_SECONDS):
                if "start" in message:
                    self.job = replace(self.job, **message["start"])
                    return
                if "refused" in message:
                    raise WorldError(message["refused"])
                if "welcome" in message:
                    # The first node decides from now on: it knows who is missing.
                    deadline, welcomed = time.monotonic() + float(message["welcome"]) + 5, True
            if self._wire.lost is not None or time.monotonic() > deadline:
                raise WorldError(self._unheard(welcomed))

    def over(self) -> bool:
        return self._over

    def close(self) -> None:
        self._wire.close()

    def _listen(self) -> None:
        for message in self._wire.receive():
            self._over |= "over" in message
            if "ended" in message:
                word = Word(**message["ended"])
                self._words[word.node] = word
        if self._wire.lost is not None and not self._over:
            self._lose(0, self._wire.lost)

    def _send(self, word: Word) -> None:
        self._wire.send({"ended": asdict(word)})

    def _unheard(self, welcomed: bool) -> str:
        place = _place(self.job)
        if welcomed:
            return (
                f"the first node's launcher at {place} has gone before the job began ({self._wire.lost or 'silent'})."
            )
        what = (
            f"answered {self._wire.strange!r}" if self._wire.strange else f"says nothing ({self._wire.lost or 'yet'})"
        )
        return (
            f"what listens at {place} is no dtrain launcher: it {what}. Give --rdzv the first node's address and a "
            "port that no other program uses."
        )


def meet(job: Job, about: Mapping[str, str], stop: Sequence[int]) -> Meeting:
    """Meets the launchers of the other nodes.

    Args:
        job: this node's part.
        about: what must be the same on all nodes, by the names that a person knows it by.
        stop: gets the signals that come meanwhile.

    Returns:
        the meeting; its `job` knows the store's port and the nonce of the whole job.

    Raises:
        WorldError: a node is missing, differs, or what listens there is something else.
        Stopped: a signal came.
    """
    listener = _listener(job)
    if listener is not None:
        host = _Host(replace(job, node_rank=0), about, listener)
        with _closed_on_failure(host):
            host.gather(stop)
        return host
    guest = _Guest(job, _connect(job, stop))
    with _closed_on_failure(guest):
        guest.join(about, stop)
    return guest


def _listener(job: Job) -> socket.socket | None:
    """Returns where the first node waits for the others; None on any other node."""
    if job.node_rank == 0:
        return listen_on(job.host, job.rdzv_port)
    if job.node_rank != BY_ARRIVAL or not is_own_address(job.host):
        return None
    try:
        return listen_on(job.host, job.rdzv_port)
    except PortBusyError:  # by another launcher of this job on the same machine; if not, that will show
        return None


def _closed_on_failure(meeting: Meeting) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.push(lambda kind, _error, _trace: meeting.close() if kind else None)
    return stack


def _connect(job: Job, stop: Sequence[int]) -> Wire:
    """Connects to the first node, which may come later than this one."""
    family_of(job.host)
    deadline, why = time.monotonic() + job.timeout, "no answer"
    while time.monotonic() < deadline:
        if stop:
            raise Stopped
        try:
            return Wire(socket.create_connection((job.host, job.rdzv_port), timeout=min(2.0, job.timeout)))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            time.sleep(_POLL_SECONDS)
    how = "with --node-rank 0"
    if job.node_rank == BY_ARRIVAL:
        how = "(or give each node its --node-rank, where that machine does not know this address as its own)"
    raise WorldError(
        f"node 0 of {job.nodes} (ranks 0 to {job.ranks - 1}) did not come: nothing listened at {_place(job)} for "
        f"{job.timeout:g} s ({why}). Start the same command there {how}, see that this address can be "
        "reached from here, or allow more time: --rdzv-timeout."
    )


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], node: int) -> str | None:
    for name, value in mine.items():
        if theirs.get(name) != value:
            return (
                f"{name} is not the same on all nodes: {value} on node 0, {theirs.get(name)} on node {node}. "
                "Run the same command with the same files on every node; another job needs another port or --job-id."
            )
    return None


def _place(job: Job) -> str:
    return f"{job.host}:{job.rdzv_port}"
