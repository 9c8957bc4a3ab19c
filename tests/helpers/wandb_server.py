"""A server that speaks as much of W&B's protocol as its client needs, records what it is sent, and misbehaves on request."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class SentRun:
    """What the server knows of one run."""

    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)  # offset -> line of the history
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    created: int = 0  # how often it was made, and not gone on with

    def rows(self) -> list[dict[str, Any]]:
        """The history, without W&B's own columns and the running values; lines without a row are left out."""
        lines = [line for _, line in sorted(self.lines.items())]
        rows = [
            {k: v for k, v in line.items() if not k.startswith(("_", "step/", "gpu/", "history"))} for line in lines
        ]
        return [row for row in rows if row]


class WandbServer:
    """Listens on loopback from its creation to `close`.

    Args:
        key: the API key that is not refused.

    Attributes:
        runs: by id.
        received: bytes of all requests, headers included.
        status: answered to everything, where it is not 200.
        loses_streams: whether histories are taken and not kept.
    """

    def __init__(self, key: str = KEY) -> None:
        self.runs: dict[str, SentRun] = {}
        self.received: list[bytes] = []
        self.operations: list[str] = []
        self.committed: list[str] = []
        self.status = 200
        self.loses_streams = False
        self.key = key
        self.hangs = threading.Event()
        self.news = threading.Condition()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, key: str | None = None) -> dict[str, str]:
        """For a process that is to use it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": key or self.key}

    def start(self) -> None:
        """Listens, again at the same port where it did before."""
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = _Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self.hangs.clear()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def vanish(self) -> None:
        """Hangs up, and refuses connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def close(self) -> None:
        self.vanish()

    def wait_for(self, condition: Any, seconds: float = 200) -> None:
        """Waits until a condition holds, which is looked at after each request."""
        with self.news:
            assert self.news.wait_for(condition, seconds), f"after {seconds} s: {self.operations}, {self.runs}"

    def the_run(self) -> SentRun:
        (run,) = self.runs.values()
        return run

    # --- what it answers ----------------------------------------------------------------------------------

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        query, variables = body["query"], body.get("variables") or {}
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found.group(1) if found else "?"
        self.operations.append(operation)
        answer = getattr(self, f"_on_{operation}", None)
        return {"data": {}} if answer is None else {"data": answer(variables)}

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {
            "viewer": {"id": "me", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        }

    def _on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "me", "name": "me"}, "bucket": None}}
        tail = [line for _, line in sorted(run.lines.items())][-1:]
        bucket = {
            "name": variables["name"], "summaryMetrics": json.dumps(run.summary), "displayName": "x", "id": "storage",
            "config": json.dumps(run.config), "historyLineCount": len(run.lines), "eventsLineCount": 0,
            "logLineCount": 0, "historyTail": json.dumps([json.dumps(line) for line in tail]), "eventsTail": "[]",
            "tags": [], "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {"id": "p", "name": "p", "entity": {"id": "me", "name": "me"}, "bucket": bucket}}

    def _on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables["name"]
        new = name not in self.runs
        run = self.runs.setdefault(name, SentRun())
        run.created += new
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        project = {"id": "p", "name": variables.get("project") or "p", "entity": {"id": "me", "name": "me"}}
        bucket = {
            "id": "storage", "name": name, "displayName": variables.get("displayName") or name, "description": None,
            "config": None, "sweepName": None, "project": project, "historyLineCount": len(run.lines),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": None}

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables["input"]
        name = f"{given['runName']} {given['artifactTypeName']} {given['artifactCollectionName']}"
        found = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": found}}

    def _on_CreateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        file = {"id": "manifest", "name": "manifest", "displayName": "m", "uploadHeaders": []}
        file["uploadUrl"] = f"{self.url}/manifest"
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def _on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        edges = []
        for one in variables["input"]["artifactFiles"]:
            run = one["artifactID"].split()[0]
            url = f"{self.url}/upload?{urlencode({'run': run, 'name': one['name']})}"
            node = {"id": "f", "name": one["name"], "displayName": one["name"], "uploadUrl": url, "uploadHeaders": []}
            node |= {"uploadMultipartUrls": None, "storagePath": one["name"], "artifact": {"id": one["artifactID"]}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        _, kind, name = variables["id"].split()
        project = {"id": "p", "internalId": "p", "name": "p", "entity": {"name": "me"}}
        source = {"__typename": "ArtifactSequence", "name": name, "project": project}
        found = {
            "__typename": "Artifact", "id": variables["id"], "artifactSequence": source, "versionIndex": 0,
            "artifactType": {"name": kind}, "description": None, "metadata": "{}", "ttlDurationSeconds": -1,
            "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED", "size": 1, "digest": "d",
            "commitHash": "c", "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z", "updatedAt": None, "aliases": [],
        }  # fmt: skip
        return {"artifact": found}

    def _on_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.committed.append((variables.get("input") or variables)["artifactID"])
        return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}

    def _on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = variables.get("run") or variables.get("runName")
        files = [{"name": name, "uploadUrl": f"{self.url}/upload?run={run}&name={name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """One chunk of a run's files: lines at an offset."""
        run = self.runs[run_id]
        for name, chunk in (body.get("files") or {}).items():
            for index, line in enumerate(chunk["content"]):
                if name == "wandb-history.jsonl":
                    run.lines[chunk["offset"] + index] = json.loads(line)
                elif name == "wandb-summary.json":
                    run.summary = json.loads(line)
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self.open: list[Any] = []
        super().__init__(*arguments)

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self.open.append(connection)
        return connection, address

    def hang_up(self) -> None:
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        pass  # who hangs up has its reasons


class _Handler(BaseHTTPRequestHandler):
    server_of: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _take(self) -> None:
        owner = self.server_of
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with owner.news:
            owner.received.append(f"{self.path}\n{self.headers}".encode() + body)
        if owner.hangs.is_set():
            threading.Event().wait(60)
            return
        with owner.news:
            status, answer = self._answer(body)
            owner.news.notify_all()
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: bytes) -> tuple[int, Any]:
        owner, path = self.server_of, urlsplit(self.path)
        known = base64.b64encode(f"api:{owner.key}".encode()).decode()
        if path.path not in ("/upload", "/manifest") and self.headers.get("Authorization") != f"Basic {known}":
            return 401, {"error": "who are you?"}
        if owner.status != 200:
            return owner.status, {"error": "so it is"}
        if path.path == "/upload":
            words = parse_qs(path.query)
            owner.runs[words["run"][0]].files[words["name"][0]] = body
        elif path.path == "/graphql":
            return 200, owner.graphql(json.loads(body))
        elif path.path.endswith("/file_stream") and not owner.loses_streams:
            owner.stream(path.path.split("/")[-2], json.loads(body))
        return 200, {}

    do_GET = do_POST = do_PUT = _take  # noqa: N815
