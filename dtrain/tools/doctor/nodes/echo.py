"""Whether nodes can reach each other: each answers with its name on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dtrain.launch.env.ports import free_port, listen_on
from dtrain.tools.doctor.network import LateError, bounded
from dtrain.tools.doctor.nodes.cluster_report import Answer

_SECONDS = 4.0
_AT_ONCE = 16
_GUESTS = 256  # that are answered at once, whoever they are


class Echo:
    """Listens on all of this machine's addresses, and tells who asks with the right token which node it has reached.

    Attributes:
        port: where.
    """

    def __init__(self, node: str, token: str) -> None:
        self._node, self._token = node, token
        self._room = threading.BoundedSemaphore(_GUESTS)
        self.port = free_port("")
        self._listener = listen_on("127.0.0.1", self.port)
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._server.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                follower, _ = self._listener.accept()
                if self._room.acquire(blocking=False):
                    threading.Thread(target=self._answer, args=(follower,), daemon=True).start()
                else:
                    follower.close()

    def _answer(self, follower: socket.socket) -> None:
        with contextlib.ExitStack() as stack, follower, contextlib.suppress(OSError):
            stack.callback(self._room.release)
            follower.settimeout(_SECONDS)
            if follower.recv(100).decode(errors="replace").strip() == self._token:
                follower.sendall(self._node.encode())

    def close(self) -> None:
        """Listens no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread; closing alone does not
        self._server.join(1.0)
        self._listener.close()


@dataclass(frozen=True)
class Peer:
    """Another node.

    Attributes:
        node: its name.
        port: where it answers.
        address: one that it is known to have.
    """

    node: str
    port: int
    address: str


def reach_all(peers: Sequence[Peer], token: str) -> Mapping[str, Answer]:
    """Connects to each peer, by its name, and where that fails by its address.

    Returns:
        node -> `by`: "name", "address" or "" where it cannot be reached; `seconds` from looking its name up to its
        answer; `error`: what was wrong with the name, or with all.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip([peer.node for peer in peers], pool.map(lambda peer: reach(peer, token), peers), strict=True))


def reach(peer: Peer, token: str) -> Answer:
    """Returns how one peer was reached; see `reach_all`."""
    errors = []
    for by, host in (("name", peer.node), ("address", peer.address)):
        began = time.monotonic()
        try:
            _call(host, peer, token)
        except (OSError, LateError, UnicodeError) as error:
            errors.append(f"{host}: {(getattr(error, 'strerror', None) or str(error)).lower()}")
            continue
        return {"by": by, "seconds": time.monotonic() - began, "error": "; ".join(errors)}
    return {"by": "", "seconds": None, "error": "; ".join(dict.fromkeys(errors))}


def _call(host: str, peer: Peer, token: str) -> None:
    address = str(bounded(lambda: socket.getaddrinfo(host, peer.port, type=socket.SOCK_STREAM)[0][4][0], _SECONDS))
    with socket.create_connection((address, peer.port), timeout=_SECONDS) as connection:
        connection.sendall(f"{token}\n".encode())
        said = connection.recv(300).decode(errors="replace")
    if said != peer.node:
        raise ConnectionError(f"{address} is {said or 'no node of this job'}")
