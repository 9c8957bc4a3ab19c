"""Carries connections to a service that asks nobody who they are through the job's handshake: rank 0's store.

::

    rank of another node            its entrance                rank 0's exit             the store
    connects to 127.0.0.1      ->   proves that it knows   ->   connects to it on    ->   listens on 127.0.0.1 alone
                                    the job's key               127.0.0.1

What the connection carries afterwards is neither encrypted nor authenticated, as is that of gloo and NCCL.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time

from dtrain.launch.env.ports import is_foreign
from dtrain.launch.nodes.admission import Admission
from dtrain.launch.nodes.handshake import LONGEST_GREETING, prove
from dtrain.launch.nodes.messages import MessageError
from dtrain.launch.nodes.wire import Wire

_PIECE = 1 << 16
_MOST_HELD = 1 << 20  # bytes that one side may be ahead of the other
_POLL_SECONDS = 0.5
_PROVE_SECONDS = 10.0
_RETRY_SECONDS = 0.05
_OPEN = {"open": True}


class Relay:
    """Copies bytes between pairs of connected sockets, both ways, in a thread of its own."""

    def __init__(self) -> None:
        self._other: dict[socket.socket, socket.socket] = {}
        self._held: dict[socket.socket, bytearray] = {}  # what a socket has yet to be sent
        self._new: queue.SimpleQueue[tuple[socket.socket, socket.socket]] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dtrain-tunnel", daemon=True)
        self._thread.start()

    def add(self, one: socket.socket, other: socket.socket) -> None:
        """Joins two sockets; both are closed once either side has ended."""
        self._new.put((one, other))
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def close(self) -> None:
        """Ends all connections."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed:
            for key, events in self._selector.select():
                if key.fileobj is self._woken:
                    self._take()
                elif key.fileobj in self._other:
                    self._serve(key.fileobj, events)
        while self._other:
            self._drop(next(iter(self._other)))
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(_PIECE)
        with contextlib.suppress(queue.Empty):
            while True:
                one, other = self._new.get_nowait()
                self._other |= {one: other, other: one}
                for side in (one, other):
                    side.setblocking(False)
                    with contextlib.suppress(OSError):
                        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._held[side] = bytearray()
                    self._selector.register(side, selectors.EVENT_READ)

    def _serve(self, one: socket.socket, events: int) -> None:
        other = self._other[one]
        try:
            if events & selectors.EVENT_READ:
                data = one.recv(_PIECE)
                if not data:
                    self._drop(one)
                    return
                self._held[other] += data
                self._flush(other)
            if events & selectors.EVENT_WRITE:
                self._flush(one)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(one)
            return
        for side in (one, other):
            full = len(self._held[self._other[side]]) > _MOST_HELD
            wanted = (0 if full else selectors.EVENT_READ) | (selectors.EVENT_WRITE if self._held[side] else 0)
            self._watch(side, wanted)

    def _flush(self, one: socket.socket) -> None:
        held = self._held[one]
        with contextlib.suppress(BlockingIOError):
            while held:
                del held[: one.send(held)]

    def _watch(self, one: socket.socket, events: int) -> None:
        known = self._selector.get_map().get(one)
        if known is None and events:
            self._selector.register(one, events)
        elif known is not None and not events:
            self._selector.unregister(one)
        elif known is not None and known.events != events:
            self._selector.modify(one, events)

    def _drop(self, one: socket.socket) -> None:
        other = self._other.pop(one)
        with contextlib.suppress(OSError):  # what came before the end is not lost
            if self._held[other]:
                other.setblocking(True)
                other.settimeout(_POLL_SECONDS)
                other.sendall(self._held[other])
        self._other.pop(other)
        for side in (one, other):
            self._watch(side, 0)
            self._held.pop(side)
            side.close()


class Exit:
    """Lets ranks that know the job's key in to a service on this machine.

    Args:
        listener: where they come; closed with this.
        key: what they prove that they know.
        service: host and port of the service.
    """

    def __init__(self, listener: socket.socket, key: bytes, service: tuple[str, int]) -> None:
        self._admission, self._service, self._relay = Admission(listener, key, "rank 0's store"), service, Relay()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dtrain-tunnel-exit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            for wire, _ in self._admission.followers(_POLL_SECONDS, _asked):
                try:
                    inner = socket.create_connection(self._service, timeout=_PROVE_SECONDS)
                except OSError:  # the service has ended
                    wire.close()
                    continue
                wire.send(_OPEN)
                self._relay.add(wire.detach(), inner)
        self._admission.close()

    def close(self) -> None:
        """Lets nobody in any more, and ends what is open."""
        self._closed = True
        self._admission.wake()
        self._thread.join(2 * _POLL_SECONDS)
        self._relay.close()


class Entrance:
    """Listens on 127.0.0.1 for this process, and carries each connection to the exit.

    Args:
        place: host and port of the exit.
        key: what this side proves that it knows, and has the exit prove.
        seconds: how long the exit may take to come.

    Attributes:
        port: where it listens.
        trouble: why the last connection could not be carried; "" where it could.
    """

    def __init__(self, place: tuple[str, int], key: bytes, seconds: float) -> None:
        self._place, self._key, self._deadline = place, key, time.monotonic() + seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.trouble = ""
        self._relay = Relay()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dtrain-tunnel-entrance", daemon=True)
        self._thread.start()

    def open(self) -> Wire | None:
        """Returns a connection to the exit, which is open; None where there is no such thing yet, see `trouble`."""
        try:
            wire = Wire(socket.create_connection(self._place, timeout=2.0), LONGEST_GREETING)
        except OSError as error:
            self.trouble = (error.strerror or str(error)).lower()
            return None
        if prove(wire, self._key, _PROVE_SECONDS):
            wire.send({"store": True})
            if _first(wire) == _OPEN:
                self.trouble = ""
                return wire
        said = f"it answered {wire.strange!r}" if wire.strange else wire.lost or "it does not know this job's key"
        self.trouble = f"what listens there is not rank 0 of this job: {said}"
        wire.close()
        return None

    def _run(self) -> None:
        while not self._closed:
            try:
                inner = self._listener.accept()[0]
            except OSError:  # closed, or this process has no descriptor left for now
                if not self._closed:
                    time.sleep(_RETRY_SECONDS)
                continue
            wire = self._opened() if _is_own(inner) else None
            if wire is None:
                inner.close()
            else:
                self._relay.add(inner, wire.detach())

    def _opened(self) -> Wire | None:
        while (wire := self.open()) is None and time.monotonic() < self._deadline and not self._closed:
            time.sleep(_RETRY_SECONDS)
        return wire

    def close(self) -> None:
        """Listens no more, and ends what is open."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self._thread.join(1.0)
        self._listener.close()
        self._relay.close()


def _is_own(inner: socket.socket) -> bool:
    """Whether a connection is this user's, since loopback is for all users of a machine; not one that was reset."""
    try:
        return not is_foreign(inner)
    except OSError:
        return False


def _asked(message: object) -> bool:
    if message != {"store": True}:
        raise MessageError
    return True


def _first(wire: Wire) -> object:
    deadline = time.monotonic() + _PROVE_SECONDS
    while wire.lost is None and time.monotonic() < deadline:
        for message in wire.receive(0.1):
            return message
    return None
