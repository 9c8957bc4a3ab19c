"""Any other node's side of the launchers' meeting: it finds the first node and has it prove itself."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dtrain.errors import WorldError
from dtrain.launch.env.job import BY_ARRIVAL, Job
from dtrain.launch.env.ports import family_of, is_foreign
from dtrain.launch.nodes.agreement import as_sent, difference_text, shown
from dtrain.launch.nodes.base import (
    POLL_SECONDS,
    InterruptedBySignal,
    MissingNodesError,
    Rendezvous,
    missing_text,
    place_of,
    ranks_of,
    taken_text,
)
from dtrain.launch.nodes.handshake import LONGEST_GREETING, check_challenge, greet
from dtrain.launch.nodes.messages import (
    ExitMessage,
    Greeting,
    MessageError,
    Refusal,
    StartMessage,
    exit_message_of,
    seconds_of,
)
from dtrain.launch.nodes.secret import OPTION, SECRET
from dtrain.launch.nodes.wire import Wire
from dtrain.launch.terminal.guarded import say

_AGAIN_SECONDS = 0.3  # between tries at a first node that hangs up before it has said anything
_PARKED_SECONDS = 1.0  # between questions whether a job that runs has come to its next attempt
_SPARE_SECONDS = 5.0
_LONGEST_TIMEOUT = 1e9


class _RunningError(WorldError):
    """The job has all its nodes, and runs."""


class OtherNode(Rendezvous):
    """The launcher of any node but the first.

    Args:
        job: its part of the job.
        about: what must be the same on all nodes.
    """

    def __init__(self, job: Job, about: Mapping[str, str]) -> None:
        super().__init__(job)
        self._about = about
        self._wire: Wire | None = None
        self._over = False

    @property
    def wire(self) -> Wire:
        """The connection to the first node."""
        assert self._wire is not None, "call join() first"  # noqa: S101 - for the type checker
        return self._wire

    def join(self, stop: Sequence[int]) -> None:
        """Finds the first node, introduces this one, and waits for the start.

        A job that runs already, and will be tried again if it fails, is waited for: a lost node's place may be this
        one's then.

        Raises:
            WorldError: the first node is missing or refuses this one, or what listens there is something else.
            InterruptedBySignal: a signal came.
        """
        family_of(self.job.host)
        deadline = time.monotonic() + self.job.timeout
        said = False
        while True:
            while not self._known_by(deadline, stop):
                _pause(_AGAIN_SECONDS, stop)
            try:
                self._await_start(deadline, stop)
                return
            except _RunningError as error:
                if not self.job.retries:
                    raise
                if not said:
                    say(f"dtrain: {error} This node waits to take a lost node's place at the next attempt.")
                said = True
                _pause(_PARKED_SECONDS, stop)
                deadline = time.monotonic() + self.job.timeout

    def over(self) -> bool:
        """See `Rendezvous.over`."""
        return self._over

    def close(self) -> None:
        """See `Rendezvous.close`."""
        if self._wire is not None:
            self._wire.close()

    def _known_by(self, deadline: float, stop: Sequence[int]) -> bool:
        """Connects, and has the first node prove itself; False where it hung up first, as one does that is crowded."""
        self.close()
        self._wire = wire = self._connect(deadline, stop)
        greeting = greet(wire)
        while wire.lost is None and not wire.strange:
            if stop:
                raise InterruptedBySignal
            for message in wire.receive(POLL_SECONDS):
                self._check(wire, greeting, message)
                wire.send({"hello": as_sent(self._about, self.job.secret), "node": self.job.node_rank})
                return True
            if time.monotonic() > deadline:
                raise WorldError(self._no_launcher())
        if wire.strange or time.monotonic() > deadline:
            raise WorldError(self._no_launcher())
        return False

    def _check(self, wire: Wire, greeting: Greeting, message: dict[str, object]) -> None:
        try:
            known = check_challenge(wire, self.job.secret.key("launchers"), greeting, message)
        except MessageError:
            wire.strange = json.dumps(message).encode()[:60]
            raise WorldError(self._no_launcher()) from None
        if not known:
            mine = f"the one from {self.job.secret.source}" if self.job.secret else "none"
            raise WorldError(
                f"the launcher at {place_of(self.job)} does not know this node's "
                f"secret ({mine}): it belongs to another "
                f"job, or the nodes have different secrets. Use the same secret on every node: {OPTION} "
                f"FILE or {SECRET}; a second job needs another port."
            )

    def _connect(self, deadline: float, stop: Sequence[int]) -> Wire:
        """Connects to the first node, which may come later than this one."""
        job, why = self.job, "no answer"
        while time.monotonic() < deadline:
            if stop:
                raise InterruptedBySignal
            try:
                connection = socket.create_connection((job.host, job.rdzv_port), timeout=min(2.0, job.timeout))
                self._refuse_foreign(connection)
                return Wire(connection, LONGEST_GREETING)
            except OSError as error:
                why = (error.strerror or str(error)).lower()
                time.sleep(POLL_SECONDS)
        how = "with --node-rank 0"
        if job.node_rank == BY_ARRIVAL:
            how = "(or set --node-rank on each node, if that machine does not recognize this address as its own)"
        raise WorldError(
            f"node 0 of {job.nodes} (ranks {ranks_of(job, 0)}) did not start: nothing listened at {place_of(job)} for "
            f"{job.timeout:g} s ({why}). Start the same command there {how}, check that this address "
            "can be reached from here, or allow more time: --rdzv-timeout."
        )

    def _refuse_foreign(self, connection: socket.socket) -> None:
        """Without a secret, at least nobody else on this machine passes for the first node."""
        if not self.job.secret and is_foreign(connection):
            connection.close()
            raise WorldError(
                f"what listens at {place_of(self.job)} is another user's process on this machine, not a launcher of "
                "this job. Choose another port, the same on every node."
            )

    def _await_start(self, deadline: float, stop: Sequence[int]) -> None:
        wire, welcomed = self.wire, False
        while True:
            if stop:
                raise InterruptedBySignal
            for message in wire.receive(POLL_SECONDS):
                try:
                    if self._is_start(message):
                        return
                    # The first node decides from now on: it knows who is missing.
                    left = seconds_of(message.get("welcome"), _LONGEST_TIMEOUT)
                except MessageError:
                    raise WorldError(f"{self._gone('it sent an invalid message')}") from None
                deadline, welcomed = time.monotonic() + left + _SPARE_SECONDS, True
            if wire.lost is not None or time.monotonic() > deadline:
                raise WorldError(self._gone(wire.lost or "silent") if welcomed else self._unheard())

    def _is_start(self, message: Mapping[str, object]) -> bool:
        if "refused" in message:
            refusal = Refusal.of(message["refused"], self.job.nodes)
            kinds = {"running": _RunningError, "late": MissingNodesError}
            raise kinds.get(refusal.why, WorldError)(self._refused(refusal))
        if "start" not in message:
            return False
        start = StartMessage.of(message["start"], self.job.nodes)
        if self.job.node_rank not in (BY_ARRIVAL, start.node_rank):
            raise MessageError
        self.job = replace(
            self.job, port=start.port, nonce=start.nonce, node_rank=start.node_rank, own_address=self.wire.own
        )
        return True

    def _refused(self, refusal: Refusal) -> str:
        job, node = self.job, refusal.node
        if refusal.why == "late":
            return missing_text(job, refusal.missing)
        if refusal.why == "taken":
            return taken_text(job, node)
        if refusal.why == "running":
            return f"the job at {place_of(job)} is already running with all its {job.nodes} nodes."
        return difference_text(
            refusal.name, shown(refusal.theirs), self._about.get(refusal.name, "nothing"), refusal.node
        )

    def _listen(self) -> None:
        for message in self.wire.receive():
            if message.get("over") is True:
                self._over = True
                continue
            try:
                word = exit_message_of(message.get("ended"), self.job.nodes)
            except MessageError:
                self.wire.lost = self.wire.lost or "it sent an invalid message"
                break
            if word.node != self.job.node_rank:
                self._words[word.node] = word
        if self.wire.lost is not None and not self._over:
            self._lose(0, self.wire.lost)

    def _send(self, word: ExitMessage) -> None:
        self.wire.send({"ended": word.message()})

    def _gone(self, why: str) -> str:
        return f"the first node's launcher at {place_of(self.job)} exited before the job began ({why})."

    def _unheard(self) -> str:
        return f"the launcher at {place_of(self.job)} did not admit this node ({self.wire.lost or 'it is silent'})."

    def _no_launcher(self) -> str:
        wire = self.wire
        what = f"answered {wire.strange!r}" if wire.strange else f"does not respond ({wire.lost or 'yet'})"
        version = "" if wire.strange else " If it is one, install the same version of dtrain on every node."
        return (
            f"what listens at {place_of(self.job)} is not a dtrain launcher: it {what}. Give --rdzv the first node's "
            f"address and a port that no other program uses.{version}"
        )


def _pause(seconds: float, stop: Sequence[int]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop:
        time.sleep(POLL_SECONDS)
