"""The nodes' tasks as the host sees them: who came, and what they answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from dtrain.launch.nodes.admission import Admission
from dtrain.launch.nodes.messages import MessageError
from dtrain.launch.nodes.wire import Wire
from dtrain.tools.doctor.nodes.cluster_report import Answer

_POLL = 0.1


class NodeConnections:
    """Connections to the nodes' tasks.

    Args:
        listener: where they come; closed with this.
        key: what they prove that they know.

    Attributes:
        lost: node -> what it was asked for, when it had gone or did not answer in time.
    """

    def __init__(self, listener: socket.socket, key: bytes) -> None:
        self._admission = Admission(listener, key, "dtrain doctor")
        self._wires: dict[str, Wire] = {}
        self._asked = 0
        self.lost: dict[str, str] = {}

    def gather(self, nodes: Sequence[str], seconds: float, over: Callable[[Container[str]], bool]) -> dict[str, Answer]:
        """Waits for the nodes.

        Args:
            nodes: their names.
            seconds: how long, at most.
            over: whether nobody can come any more but those that have.

        Returns:
            node -> what it said of itself, of those that came.
        """
        came: dict[str, Answer] = {}
        deadline = time.monotonic() + seconds
        while len(came) < len(nodes) and time.monotonic() < deadline:
            ended = over(came)
            for wire, hello in self._admission.followers(_POLL, lambda message: _hello(message, nodes)):
                came |= self._meet(wire, hello)
            if ended and not self._admission.busy:
                break
        return came

    def _meet(self, wire: Wire, hello: Answer) -> dict[str, Answer]:
        node = hello["node"]
        if node in self._wires:  # nobody takes another's place
            wire.close()
            return {}
        self._wires[node] = wire
        return {node: {**hello, "address": wire.peer}}

    def ask(self, what: str, more: Mapping[str, Answer] | None = None, *, seconds: float) -> dict[str, Answer]:
        """Asks nodes for something, all at once.

        Args:
            what: see `task`.
            more: node -> what goes with it, of the nodes that are asked; None for all, with nothing.
            seconds: how long the answers may take.

        Returns:
            node -> its answer; those that do not answer are `lost` from then on.
        """
        wanted = {node: {} for node in self._wires} if more is None else dict(more)
        wanted = {node: with_it for node, with_it in wanted.items() if node not in self.lost}
        self._asked += 1
        for node, with_it in wanted.items():
            self._wires[node].send({"do": what, "id": self._asked, "with": with_it})
        answers: dict[str, Answer] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(wanted) and time.monotonic() < deadline:
            open_ = [node for node in wanted if node not in answers and self._wires[node].lost is None]
            if not open_:
                break
            for node in open_:
                answers |= self._answer(node, _POLL / len(open_))
        for node in wanted.keys() - answers.keys():
            self.lost[node] = f"{what} ({self._wires[node].lost or f'no answer within {seconds:g} s'})"
        return {node: answers[node] for node in wanted if node in answers}

    def _answer(self, node: str, seconds: float) -> dict[str, Any]:
        answers = [one["answer"] for one in self._wires[node].receive(seconds) if one.get("id") == self._asked]
        return {node: answers[0]} if answers else {}

    def close(self) -> None:
        """Lets all go."""
        for wire in self._wires.values():
            if wire.lost is None:
                wire.send({"do": "end"})
            wire.close()
        self._admission.close()


def _hello(message: object, nodes: Sequence[str]) -> Answer:
    hello = message.get("hello") if isinstance(message, dict) else None
    if not isinstance(hello, dict) or hello.get("node") not in nodes:
        raise MessageError
    return hello
