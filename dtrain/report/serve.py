"""The page, served to this machine alone, with what is new as training goes on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dtrain.config.saved import CONFIG
from dtrain.errors import UsageError
from dtrain.launch.ports import holder_of
from dtrain.lock import living_owner
from dtrain.report.data import page_data
from dtrain.report.finding import Place, find_runs
from dtrain.report.render import policy, render
from dtrain.report.runs import Run, read_run
from dtrain.slurm.record import FILE_NAME as JOB
from dtrain.slurm.record import FOLDER as SLURM
from dtrain.starts import FILE_NAME as STARTS

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_READ = (CONFIG, STARTS, f"{SLURM}/{JOB}")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'",
}


class Site:
    """What is served: runs as they are at the moment of the question. Files that have not changed are not read again.

    Args:
        names: as for `find_runs`; none for all that there are, those included that come later.
        runs: the folder of the runs.

    Raises:
        UsageError: there is nothing of a name.
    """

    def __init__(self, names: Sequence[str], runs: Path) -> None:
        self._names = names
        self._runs = runs
        self._places = find_runs(names, runs)
        self._known: dict[Place, tuple[Any, Run]] = {}
        self._seen: Any = None
        self._body, self._tag = b"", ""
        self._turn = threading.Lock()

    def data(self) -> tuple[bytes, str]:
        """Returns the runs as JSON, and a tag that is another one whenever that is."""
        with self._turn:
            runs = list(self._read())
            seen = [(place, mark) for place, (mark, _) in self._known.items()]
            if seen != self._seen:
                self._body = json.dumps(page_data(runs, live=True), allow_nan=False, separators=(",", ":")).encode()
                self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'
                self._seen = seen
            return self._body, self._tag

    def page(self) -> bytes:
        """Returns the page, with the runs in it."""
        return render(json.loads(self.data()[0]), live=True).encode()

    def _read(self) -> Iterator[Run]:
        with contextlib.suppress(UsageError):  # one has gone since: the others are still shown
            self._places = find_runs(self._names, self._runs)
        before, self._known = self._known, {}
        for place in self._places:
            mark = _mark(place)
            known = before.get(place)
            self._known[place] = known if known is not None and known[0] == mark else (mark, read_run(place))
            yield self._known[place][1]


def _mark(place: Place) -> tuple[Any, ...]:
    """Returns what is another one whenever a run's files have changed, or its owner."""
    failures = sorted(place.folder.glob("failure*.json"))
    files = [place.history, *(place.folder / name for name in _READ), *failures]
    return (str(living_owner(place.folder)), *map(_stamp, files))


def _stamp(file: Path) -> tuple[str, int, int, int]:
    try:
        found = file.stat()
    except OSError:
        return str(file), 0, 0, 0
    return str(file), found.st_ino, found.st_mtime_ns, found.st_size


class _Handler(BaseHTTPRequestHandler):
    """Answers for two addresses, the page and its data; to those alone who call this machine by its own name.

    A foreign page whose name was made to lead here (DNS rebinding) calls it by another one.
    """

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dtrain", ""
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """Answers a request."""
        host = self.headers.get("Host", "").rpartition(":")
        name = host[0] if host[1] and host[2].isdigit() else host[2]
        path = self.path.partition("?")[0]
        if name.lower() not in _NAMES:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"Call this server {ADDRESS} or localhost.\n".encode())
        elif path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.server.site.page())
        elif path == "/data.json":
            self._data()
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is nothing here but /.\n")

    do_HEAD = do_GET  # noqa: N815 - its name is the base class's

    def _data(self) -> None:
        body, tag = self.server.site.data()
        if self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, None, b"", ETag=tag)
        else:
            self._answer(HTTPStatus.OK, "application/json", body, ETag=tag)

    def _answer(self, status: HTTPStatus, kind: str | None, body: bytes, **more: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **more}.items():
            self.send_header(name, value)
        if kind is not None:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of single requests."""


class Server(ThreadingHTTPServer):
    """The server, listening.

    Args:
        site: what it serves.
        port: 0 for any that is free.

    Raises:
        UsageError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"is in use{holder_of(port)}"
            else:
                why = f"cannot be listened on: {os.strerror(error.errno or 0)}"
            raise UsageError(f"--port {port}: port {port} {why}. Choose another one, or 0 for any free one.") from None

    def server_bind(self) -> None:
        """Takes the port, without asking a name server for this machine's name, as the base class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def address(self) -> str:
        """The page's URL."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def words(self) -> list[str]:
        """Returns what to tell the person who started it."""
        port = self.server_port
        return [
            f"report: {self.address} (for this machine alone; Ctrl-C ends it)",
            f"from elsewhere: ssh -L {port}:{ADDRESS}:{port} {socket.gethostname()}, then open that address there",
        ]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Takes no notice of a browser that has gone; anything else is a fault, and told."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
