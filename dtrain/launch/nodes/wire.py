"""One connection between two launchers: JSON lines, each with a MAC once both have a key."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import select
import socket
from typing import Any

# A peer whose machine or network is gone is noticed after 2 + 4 * 2 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 10_000}
LONGEST = 1 << 23
_SEND_SECONDS = 5.0
_MAC_DIGITS = hashlib.sha256().digest_size * 2  # hexadecimal, before each line


class Wire:
    """Sends and receives mappings over a connected socket, never blocking on a silent peer.

    Args:
        connection: the socket.
        longest: bytes of the longest line that is taken; raise it once the peer is known.

    Attributes:
        peer: the other side's address.
        own: this side's.
        lost: why nothing can come any more; None while the connection is up.
        strange: the first bytes of something that is no such message; empty where there were none.
    """

    def __init__(self, connection: socket.socket, longest: int = LONGEST) -> None:
        self._socket = connection
        self._socket.settimeout(_SEND_SECONDS)
        self._held = b""
        self._keys: tuple[bytes, bytes] | None = None
        self._sent = self._received = 0
        self.longest = longest
        self.peer = str(connection.getpeername()[0])
        self.own = str(connection.getsockname()[0])
        self.lost: str | None = None
        self.strange = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        """Returns the socket's descriptor, for selectors."""
        return self._socket.fileno()

    def authenticate(self, sending: bytes, receiving: bytes) -> None:
        """From now on each line carries an HMAC of its number and content, and one that does not is refused.

        Args:
            sending: the key of this side's lines.
            receiving: that of the other's; another one, so that no line can be sent back as an answer.
        """
        self._keys = sending, receiving

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; where the peer is gone, `lost` says so."""
        line = json.dumps(message).encode()
        if self._keys is not None:
            line = _mac(self._keys[0], self._sent, line) + line
            self._sent += 1
        try:
            self._socket.sendall(line + b"\n")
        except OSError as error:
            self.lost = self.lost or _reason(error)

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Returns the messages that have come, after waiting for the first bytes for some seconds at most."""
        if self.lost is not None:
            return []
        try:
            if not _readable(self._socket, seconds):
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
        foreign = self._keys is None and self._held[:1] not in (b"", b"{")  # no need to wait for the line's end
        if foreign or len(self._held) > self.longest:
            lines.append(self._held)
        found = []
        for line in lines:
            message = self._opened(line) if len(line) <= self.longest else None
            if message is None:
                self.strange = self.strange or line[:60] or b"\n"
                self.lost = self.lost or "it speaks another protocol"
                self._held = b""
                break
            found.append(message)
        return found

    def _opened(self, line: bytes) -> dict[str, Any] | None:
        if self._keys is None:
            return _decoded(line)
        mac, line = line[:_MAC_DIGITS], line[_MAC_DIGITS:]
        if not hmac.compare_digest(mac, _mac(self._keys[1], self._received, line)):
            return None
        self._received += 1
        return _decoded(line)

    def detach(self) -> socket.socket:
        """Returns the socket, for other uses; nothing may have come that was not received."""
        return self._socket

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _readable(connection: socket.socket, seconds: float) -> bool:
    # Not select(), which knows no descriptor above 1023.
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _mac(key: bytes, number: int, line: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + line, hashlib.sha256).hex().encode()


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
