"""The first node's side of the launchers' meeting: it waits for the others and starts the job."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dtrain.errors import WorldError
from dtrain.launch.env.interfaces import is_loopback
from dtrain.launch.env.job import BY_ARRIVAL, Job
from dtrain.launch.env.limits import allow_open_files
from dtrain.launch.env.ports import free_port
from dtrain.launch.nodes.admission import GREETING_SECONDS, Admission
from dtrain.launch.nodes.agreement import PLACE, as_sent, difference_text, first_difference, shown
from dtrain.launch.nodes.base import (
    POLL_SECONDS,
    InterruptedBySignal,
    MissingNodesError,
    Rendezvous,
    missing_text,
    taken_text,
)
from dtrain.launch.nodes.messages import ExitMessage, Hello, MessageError, Refusal, exit_message_of
from dtrain.launch.nodes.wire import Wire

# Of each node: its connection, and one that came before it from the same node and is not yet known to have gone.
_FILES_OF_A_NODE, _SPARE_FILES = 2, 256


class FirstNode(Rendezvous):
    """Node 0's launcher.

    Args:
        job: its part of the job.
        about: what must be the same on all nodes.
        listener: where the others come; closed with this.
    """

    def __init__(self, job: Job, about: Mapping[str, str], listener: socket.socket) -> None:
        super().__init__(job)
        self._about, self._sent = about, as_sent(about, job.secret)
        allow_open_files(_FILES_OF_A_NODE * job.nodes + _SPARE_FILES, f"--nodes {job.nodes}")
        self._admission = Admission(
            listener, job.secret.key("launchers"), "the launchers' port", by_user=not job.secret, most=2 * job.nodes
        )
        self._nodes: dict[int, Wire] = {}
        self._ready = selectors.DefaultSelector()  # of a thousand nodes, few have something to say at a time
        self._deadline = time.monotonic() + job.timeout
        self._started = False

    def gather(self, stop: Sequence[int]) -> None:
        """Waits for all nodes and starts the job.

        Raises:
            WorldError: a node did not come in time, or differs; every node that came learns why.
            InterruptedBySignal: a signal came.
        """
        while len(self._nodes) < self.job.nodes - 1:
            if stop:
                raise InterruptedBySignal
            self._receive_followers(POLL_SECONDS)
            if self._is_late():
                missing = [node for node in range(1, self.job.nodes) if node not in self._nodes]
                self._refuse_all(Refusal("late", missing=tuple(missing)))
                raise MissingNodesError(missing_text(self.job, missing, self._admission.dropped))
        self._started = True
        own = [wire.own for wire in self._nodes.values()]  # one of this machine's launchers may be connected within it
        outside = next((address for address in own if not is_loopback(address)), own[0])
        self.job = replace(self.job, port=free_port(""), own_address=outside)
        for node, wire in self._nodes.items():
            wire.send({"start": {"port": self.job.port, "nonce": self.job.nonce, "node_rank": node}})

    def _is_late(self) -> bool:
        """Whether the time to come is over for those that are missing; who is connected may still say who it is."""
        spare = GREETING_SECONDS if self._admission.busy else 0.0
        return len(self._nodes) < self.job.nodes - 1 and time.monotonic() > self._deadline + spare

    def over(self) -> bool:
        """See `Rendezvous.over`."""
        ended = len(self._words) == self.job.nodes
        if ended:
            for wire in self._nodes.values():
                wire.send({"over": True})
        return ended

    def close(self) -> None:
        """See `Rendezvous.close`."""
        self._ready.close()
        for wire in self._nodes.values():
            wire.close()
        self._admission.close()

    def _listen(self) -> None:
        self._receive_followers(0.0)
        for node in self._speaking():
            wire = self._nodes[node]
            for message in wire.receive():
                word = self._word(message)
                if word is None:
                    wire.lost = wire.lost or "it sent an invalid message"
                elif word.node == node:  # nobody speaks for another node
                    self._words[node] = word
        for node, wire in self._nodes.items():
            if wire.lost is not None:
                self._lose(node, wire.lost)

    def _word(self, message: Mapping[str, object]) -> ExitMessage | None:
        try:
            return exit_message_of(message.get("ended"), self.job.nodes)
        except MessageError:
            return None

    def _send(self, word: ExitMessage) -> None:
        for wire in self._nodes.values():
            wire.send({"ended": word.message()})

    def _receive_followers(self, seconds: float) -> None:
        for wire, hello in self._admission.followers(seconds, Hello.of):
            self._meet(wire, hello)
        if not self._started:  # one that has gone may come again; one that speaks before the start is no launcher
            for node in self._speaking():
                wire = self._nodes[node]
                if wire.receive() or wire.lost:
                    self._ready.unregister(wire)
                    wire.close()
                    del self._nodes[node]

    def _meet(self, wire: Wire, hello: Hello) -> None:
        node = hello.node
        if node == BY_ARRIVAL:
            node = next(number for number in range(1, self.job.nodes + 1) if number not in self._nodes)
        name = first_difference(self._sent, hello.about)
        if name is not None:
            problem = difference_text(name, self._about[name], shown(hello.about.get(name)), node)
            self._refuse(wire, Refusal("differs", node, name, self._sent[name]))
            # One of another job, which came to the wrong place, ends nothing here.
            if name != PLACE and not self._started:
                self._refuse_all(Refusal("differs", node, name, self._sent[name]))
                raise WorldError(problem)
        elif self._started:
            self._refuse(wire, Refusal("running", node))
        elif node in self._nodes or not 0 < node < self.job.nodes:
            self._refuse(wire, Refusal("taken", node))
            self._refuse_all(Refusal("taken", node))
            raise WorldError(taken_text(self.job, node))
        else:
            self._nodes[node] = wire
            self._ready.register(wire, selectors.EVENT_READ, node)
            wire.send({"welcome": max(0.0, self._deadline - time.monotonic())})

    def _speaking(self) -> list[int]:
        """Returns the nodes from which something has come, if only the end of their connection."""
        return [key.data for key, _ in self._ready.select(0)]

    def _refuse(self, wire: Wire, refusal: Refusal) -> None:
        wire.send({"refused": refusal.message()})
        wire.close()

    def _refuse_all(self, refusal: Refusal) -> None:
        for wire in self._nodes.values():
            wire.send({"refused": refusal.message()})
