"""One connection between two launchers: JSON lines, and a quick word where the other side is gone."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from typing import Any

# A peer whose machine or network is gone is noticed after 2 + 4 * 2 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 10_000}
_LONGEST = 1 << 20


class Wire:
    """Sends and receives mappings over a connected socket, never blocking on a silent peer.

    Attributes:
        peer: the other side's address.
        lost: why nothing can come any more; None while the connection is up.
        strange: the first bytes of something that is no such message; empty where there were none.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(5)
        self._held = b""
        self.peer = str(connection.getpeername()[0])
        self.lost: str | None = None
        self.strange = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; where the peer is gone, `lost` says so."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self.lost = self.lost or _reason(error)

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Returns the messages that have come, after waiting for the first bytes for some seconds at most."""
        if self.lost is not None:
            return []
        try:
            readable, _, _ = select.select([self._socket], [], [], seconds)
            if not readable:
                return []
            data = self._socket.recv(1 << 16)
        except OSError as error:
            self.lost = _reason(error)
            return []
        if not data:
            self.lost = "the connection was closed"
        return self._messages(data)

    def _messages(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._held = (self._held + data).split(b"\n")
        if len(self._held) > _LONGEST:
            lines.append(self._held)
        found = []
        for line in lines:
            message = _decoded(line)
            if message is None:
                self.strange = self.strange or line[:60]
                self.lost = self.lost or "it speaks another protocol"
                break
            found.append(message)
        return found

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
