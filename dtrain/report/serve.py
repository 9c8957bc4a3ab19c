"""The page, served to this machine alone, with what is new as training goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from dtrain.errors import UsageError
from dtrain.launch.env.ports import holder_of
from dtrain.report.access import Access, refusal
from dtrain.report.render import policy
from dtrain.report.site import Site

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_COMMAND = "dtrain report --serve"
_PACKET = 1 << 18  # bytes that are written at once: more are never put together for one client
_MOST_IDLE = 256  # connections that have yet to ask, or to ask again; the oldest gives way
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'",
}


class _Handler(BaseHTTPRequestHandler):
    """Answers for two addresses, the page and its data; to those alone who have the token.

    They must call this machine by its own name: a foreign page whose name was made to lead here (DNS rebinding) calls
    it by another one.
    """

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dtrain", ""
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """Answers a request."""
        with self.server.busy(self.connection):
            self._reply()

    do_HEAD = do_GET  # noqa: N815 - its name is the base class's

    def _reply(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")
        name = host[0] if host[1] and host[2].isdigit() else host[2]
        path = self.path.partition("?")[0]
        access, port = self.server.access, self.server.server_port
        if name.lower() not in _NAMES:
            self.close_connection = True
            self._say(HTTPStatus.FORBIDDEN, f"Use the host name {ADDRESS} or localhost.\n")
        elif access.given(self.path):
            # No cache keeps this answer, and no later request has the token in its address or Referer.
            self._answer(
                HTTPStatus.SEE_OTHER,
                None,
                [],
                {"Set-Cookie": access.cookie(port), "Location": "/"},
            )
        elif not access.allows(self.headers, port):
            # One short answer fits into the connection, whether it is read or not: no stranger holds a thread up.
            self.close_connection = True
            self._say(HTTPStatus.FORBIDDEN, refusal(_COMMAND))
        elif path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.server.site.page())
        elif path == "/data.json":
            self._data()
        else:
            self._say(HTTPStatus.NOT_FOUND, "Not found.\n")

    def _data(self) -> None:
        since = parse_qs(self.path.partition("?")[2]).get("since", [""])[0]
        known = self.headers.get("If-None-Match", "").strip('"')
        parts, tag = self.server.site.data(since, known)
        if parts is None:
            self._answer(HTTPStatus.NOT_MODIFIED, None, [], {"ETag": f'"{tag}"'})
        else:
            self._answer(HTTPStatus.OK, "application/json", parts, {"ETag": f'"{tag}"'})

    def _say(self, status: HTTPStatus, words: str) -> None:
        self._answer(status, "text/plain", [words.encode()])

    def _answer(
        self, status: HTTPStatus, kind: str | None, parts: Sequence[bytes], more: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        if kind is not None:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(sum(map(len, parts))))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            for packet in _packets(parts):
                self.wfile.write(packet)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of single requests, whose addresses may hold the token."""


def _packets(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Puts small parts together, so that each write is worth its system call."""
    waiting: list[bytes] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= _PACKET:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


class Server(ThreadingHTTPServer):
    """The server, listening.

    Args:
        site: what it serves.
        port: 0 for any that is free.
        access: who may see it.

    Raises:
        UsageError: the port cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128  # of 5, as the base class has it, a browser's sixth waits a second and asks again

    def __init__(self, site: Site, port: int, access: Access) -> None:
        self.site, self.access = site, access
        self._idle: dict[Any, None] = {}  # connections, the oldest first
        self._turn = threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"is in use{holder_of(port)}"
            else:
                why = f"cannot be opened: {os.strerror(error.errno or 0)}"
            raise UsageError(f"--port {port}: port {port} {why}. Choose another port, or 0 for any free one.") from None

    def server_bind(self) -> None:
        """Takes the port, without asking a name server for this machine's name, as the base class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def address(self) -> str:
        """The page's URL, with the token."""
        return f"http://{ADDRESS}:{self.server_port}/{self.access.query()}"

    def words(self) -> list[str]:
        """Returns what to tell the person who started it."""
        port = self.server_port
        whom = "anyone with this address" if self.access.token else "all users of this machine"
        return [
            f"report: {self.address} (this machine only, for {whom}; stop with Ctrl-C)",
            f"from another machine: ssh -L {port}:{ADDRESS}:{port} "
            f"{socket.gethostname()}, then open that address there",
        ]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection; of many that ask nothing, the oldest is closed, so that others are still answered."""
        with self._turn:
            self._idle[request] = None
            oldest = next(iter(self._idle)) if len(self._idle) > _MOST_IDLE else None
            self._idle.pop(oldest, None)
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        with self._turn:
            self._idle.pop(request, None)
        super().shutdown_request(request)

    @contextlib.contextmanager
    def busy(self, request: Any) -> Iterator[None]:
        """While a connection's question is answered, it is not one that may be closed."""
        with self._turn:
            self._idle.pop(request, None)
        yield
        with self._turn:
            self._idle[request] = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Takes no notice of a browser that has gone; anything else is a fault, and told."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
