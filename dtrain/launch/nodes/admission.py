"""Where the first node waits for the others; peers that do not authenticate are dropped and learn nothing."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dtrain.launch.env.ports import is_foreign
from dtrain.launch.nodes.handshake import LONGEST_GREETING, challenge
from dtrain.launch.nodes.messages import MessageError
from dtrain.launch.nodes.wire import LONGEST, Wire
from dtrain.launch.terminal.guarded import say as print_line

GREETING_SECONDS = 10.0
MOST_WAITING = 64
_AT_ONCE = 256  # connections taken in one look
_NOTED = 3
_KINDS = {
    "garbage": "it sent an invalid message",
    "proof": "it does not know this job's secret",
    "left": "it hung up once this node had answered it: most likely a launcher with another secret, or with none",
    "user": "it belongs to another user of this machine",
    "slow": f"it did not identify itself within {GREETING_SECONDS:g} s",
    "many": "too many connections waited at once that had not said who they are",
}
T = TypeVar("T")


@dataclass
class _PendingConnection:
    """A connection that has not proved yet that it belongs here."""

    wire: Wire
    since: float
    greeted: bool = False


class Admission:
    """Takes connections on a listening socket.

    Args:
        listener: it; closed with this.
        key: what guests prove that they know.
        service: what they come for, in words.
        by_user: whether peers on this machine must be this user's: where everybody can make the key.
        say: shows a line to a person; once for each kind of peer that is dropped.
        most: connections that may wait at once without having proved anything, as all nodes of a job may do.

    Attributes:
        dropped: the first peers that were dropped, in words.
    """

    def __init__(  # noqa: PLR0913 - keyword-only
        self,
        listener: socket.socket,
        key: bytes,
        service: str,
        *,
        by_user: bool = False,
        say: Callable[[str], None] | None = None,
        most: int = MOST_WAITING,
    ) -> None:
        self._by_user, self._most = by_user, max(most, MOST_WAITING)
        self._listener, self._key, self._service, self._say = listener, key, service, say or print_line
        self._callers: dict[int, _PendingConnection] = {}  # by descriptor, the oldest first
        self._said: set[str] = set()
        self.dropped: list[str] = []
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def followers(self, seconds: float, parse: Callable[[object], T]) -> list[tuple[Wire, T]]:
        """Returns who has come and has proved to belong here, with what it said of itself.

        Args:
            seconds: how long to wait where nobody stirs.
            parse: reads what a guest says of itself; a MessageError has it dropped.
        """
        came = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd in self._callers:
                came += self._hear(self._callers[key.fd], parse)
        now = time.monotonic()
        for caller in [one for one in self._callers.values() if now - one.since > GREETING_SECONDS]:
            self._drop(caller, "slow")
        return came

    @property
    def busy(self) -> bool:
        """Whether connections are here that may still authenticate."""
        return bool(self._callers)

    def wake(self) -> None:
        """Ends a wait of another thread in `followers`; nobody can come any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Listens no more, and lets all go that have not come in."""
        for caller in list(self._callers.values()):
            self._forget(caller)
            caller.wire.close()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except OSError:  # none is left, or this process has no descriptor left
                return
            try:
                foreign = self._by_user and is_foreign(connection)
                wire = Wire(connection, LONGEST_GREETING)
            except OSError:  # it has gone again
                connection.close()
                continue
            if foreign:
                self._note(str(address[0]), "user", "")
                wire.close()
                continue
            caller = _PendingConnection(wire, time.monotonic())
            self._callers[wire.fileno()] = caller
            self._selector.register(wire, selectors.EVENT_READ)
            if len(self._callers) > self._most:
                # A launcher proves itself within milliseconds: the oldest is none, most likely.
                self._drop(next(iter(self._callers.values())), "many")

    def _hear(self, caller: _PendingConnection, parse: Callable[[object], T]) -> list[tuple[Wire, T]]:
        wire = caller.wire
        messages = wire.receive()
        try:
            if len(messages) > 1 or (messages and wire.lost):
                raise MessageError
            if messages and caller.greeted:
                said = parse(messages[0])
                self._forget(caller)
                wire.longest = LONGEST
                return [(wire, said)]
            if messages:
                challenge(wire, self._key, messages[0])
                caller.greeted = True
        except MessageError:
            self._drop(caller, "garbage")
            return []
        if wire.strange:
            self._drop(caller, "proof" if caller.greeted else "garbage")
        elif wire.lost is not None:
            self._drop(caller, "left" if caller.greeted else "")
        return []

    def _drop(self, caller: _PendingConnection, kind: str) -> None:
        wire = caller.wire
        self._forget(caller)
        wire.close()
        if not kind:  # it has gone without a word, as what looks for open ports does
            return
        self._note(wire.peer, kind, repr(wire.strange) if wire.strange and kind == "garbage" else "")

    def _note(self, peer: str, kind: str, sent: str) -> None:
        if len(self.dropped) < _NOTED:
            self.dropped.append(f"{peer} sent {sent}" if sent else f"{peer} {_KINDS[kind].removeprefix('it ')}")
        if kind not in self._said:
            self._said.add(kind)
            self._say(
                f"dtrain: warning: a connection from {peer} to {self._service} was dropped: {_KINDS[kind]}. "
                "Further ones of this kind are dropped silently."
            )

    def _forget(self, caller: _PendingConnection) -> None:
        self._selector.unregister(caller.wire)
        del self._callers[caller.wire.fileno()]
