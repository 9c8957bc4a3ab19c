"""The launchers of a job's nodes: they meet before any rank starts, and stay in touch until the job has ended.

::

    node 0: listens on the port that --rdzv names          node 1, 2, ...: connect, again and again
            both prove that they know one secret; from then on each line has a MAC (`dtrain.launch.nodes.handshake`)
                                                       <-  "hello": which node, and what must be the same on all
            "welcome", with the seconds that are left  ->
            "refused", to all, where something differs ->
            "start", once all are there: store, nonce  ->
            how a part of the job ended               <->  how a part of the job ended
            "over", once every part ended well         ->

Without --node-rank, the node that has the address of --rdzv is node 0, and the others are numbered as they come.

A launcher that vanishes is noticed by its connection's end, or by keep-alive probes where the network is cut.
This is what both sides share; see `dtrain.launch.nodes.first_node` and `dtrain.launch.nodes.other_node`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from dtrain.errors import EXIT_FAILED, WorldError
from dtrain.launch.env.job import Job
from dtrain.launch.monitor.postmortem import RankFailure
from dtrain.launch.nodes.messages import ExitMessage

POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 1.0


class MissingNodesError(WorldError):
    """Nodes did not come in time, though the first one is there, and this one."""


class InterruptedBySignal(Exception):  # noqa: N818 - no error: a signal came
    """A signal came while the launchers were still meeting."""


class Rendezvous:
    """One node's launcher among the others; made by `meet`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._words: dict[int, ExitMessage] = {}

    def news(self) -> ExitMessage | None:
        """Returns how another node's part ended badly, once one has; never waits."""
        self._listen()
        # One without words was ended because of another, and tells how its ranks fared.
        bad = [word for word in self._words.values() if word.text and word.node != self.job.node_rank]
        return min(bad, key=lambda word: word.order, default=None)

    def ended(self, seconds: float) -> dict[str, str]:
        """Returns how ranks of the other nodes ended, as far as their launchers tell within some seconds."""
        deadline = time.monotonic() + seconds
        while len(self._words) < self.job.nodes and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._listen()
        return {rank: how for word in self._words.values() for rank, how in word.ended.items()}

    def exit_messages(self, seconds: float = _LAST_WORDS_SECONDS) -> ExitMessage | None:
        """Waits a moment for what other nodes have to say, after this node's ranks failed; returns as `news`."""
        deadline = time.monotonic() + seconds
        while (word := self.news()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return word

    def tell(self, word: ExitMessage) -> None:
        """Tells the other nodes how this node's part ended."""
        self._words[word.node] = word
        self._send(word)

    def pass_on(self, word: ExitMessage) -> None:
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

    def _send(self, word: ExitMessage) -> None:
        raise NotImplementedError

    def _lose(self, node: int, why: str) -> None:
        """Notes that a node's launcher is gone without a word."""
        text = (
            f"dtrain: error: node {node} is lost ({why}): its launcher or machine stopped, or the network failed. "
            "Check that node's output."
        )
        ranks = range(node * self.job.ranks, (node + 1) * self.job.ranks)
        failure = asdict(RankFailure.of_lost_node(node, ranks))
        self._words.setdefault(node, ExitMessage(node, EXIT_FAILED, text, time.time(), lost=True, failure=failure))


def place_of(job: Job) -> str:
    """Returns where the launchers meet, as HOST:PORT."""
    return f"{job.host}:{job.rdzv_port}"


def ranks_of(job: Job, node: int) -> str:
    """Returns the numbers of a node's ranks, in words."""
    return f"{node * job.ranks} to {(node + 1) * job.ranks - 1}"


def taken_text(job: Job, node: int) -> str:
    """Returns what a person should read of a second launcher of one node."""
    return (
        f"a second launcher joined {place_of(job)} as node {node}. Give each node its own --node-rank, "
        f"0 to {job.nodes - 1}; another job needs another port or --job-id."
    )


def missing_text(job: Job, missing: Sequence[int], dropped: Sequence[str] = ()) -> str:
    """Returns what a person should read of nodes that did not come.

    Args:
        job: the job.
        missing: their numbers.
        dropped: who came instead, in words.
    """
    ranks = ", ".join(ranks_of(job, node) for node in missing)
    others = f" Dropped connections: {'; '.join(dropped)}." if dropped else ""
    return (
        f"node {', '.join(map(str, missing))} of {job.nodes} (ranks {ranks}) did not reach "
        f"{place_of(job)} within {job.timeout:g} s.{others} Start the same command there (with "
        "its own --node-rank, if you use them), check that it can reach this "
        "address, or allow more time: --rdzv-timeout."
    )
