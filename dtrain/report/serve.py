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
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dtrain import __version__
from dtrain.config.saved import CONFIG
from dtrain.errors import UsageError
from dtrain.launch.ports import holder_of
from dtrain.lock import living_owner
from dtrain.report.data import page_data, run_data
from dtrain.report.finding import Place, find_runs
from dtrain.report.render import policy, render
from dtrain.report.runs import read_run
from dtrain.slurm.record import FILE_NAME as JOB
from dtrain.slurm.record import FOLDER as SLURM
from dtrain.starts import FILE_NAME as STARTS

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_ANSWERS = 16  # that a page may come back to
_READ = (CONFIG, STARTS, f"{SLURM}/{JOB}")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'",
}


_Mark = tuple[Any, ...]


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
        self._known: dict[Place, tuple[_Mark, bytes]] = {}  # each run's files, and what the page shows of it, as JSON
        self._told: dict[str, dict[Place, _Mark]] = {}  # by tag, the last ones
        self._turn = threading.Lock()

    def data(self, since: str = "", known: str = "") -> tuple[bytes | None, str]:
        """Returns the runs as JSON, and a tag that is another one whenever that is.

        Args:
            since: the tag of an earlier answer; of a run that has not changed since there is the name alone.
            known: the tag of an answer that is at hand; where nothing has changed since, there is no other: None.
        """
        with self._turn:
            self._read()
            marks = {place: mark for place, (mark, _) in self._known.items()}
            tag = hashlib.sha256(repr([__version__, *marks.items()]).encode(errors="replace")).hexdigest()[:32]
            before = self._told.get(since, {})
            self._told = dict([*((k, v) for k, v in self._told.items() if k != tag), (tag, marks)][-_ANSWERS:])
            if tag == known:
                return None, tag
            parts = [
                json.dumps(place.name).encode() if before.get(place) == mark else body
                for place, (mark, body) in self._known.items()
            ]
        head = json.dumps(page_data([], live=True) | {"tag": tag}).encode()
        return head.replace(b'"runs": []', b'"runs": [' + b",".join(parts) + b"]"), tag

    def page(self) -> bytes:
        """Returns the page, with the runs in it."""
        return render(json.loads(self.data()[0] or b"{}"), live=True).encode()

    def _read(self) -> None:
        with contextlib.suppress(UsageError):  # one has gone since: the others are still shown
            self._places = find_runs(self._names, self._runs)
        before, self._known = self._known, {}
        for place in self._places:
            mark = _mark(place)
            known = before.get(place)
            if known is None or known[0] != mark:
                shown = json.dumps(run_data(read_run(place)), allow_nan=False, separators=(",", ":"))
                known = mark, shown.encode()
            self._known[place] = known


def _mark(place: Place) -> _Mark:
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
        since = parse_qs(urlsplit(self.path).query).get("since", [""])[0]
        known = self.headers.get("If-None-Match", "").strip('"')
        body, tag = self.server.site.data(since, known)
        if body is None:
            self._answer(HTTPStatus.NOT_MODIFIED, None, b"", ETag=f'"{tag}"')
        else:
            self._answer(HTTPStatus.OK, "application/json", body, ETag=f'"{tag}"')

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
