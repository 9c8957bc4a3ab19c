"""One node's task: it comes to the host, and does what that asks for until it is told to go."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dtrain.errors import WorldError
from dtrain.files import write_below
from dtrain.launch.env.job import Job
from dtrain.launch.env.ports import free_port
from dtrain.launch.env.threads import usable_cores
from dtrain.launch.nodes.handshake import prove
from dtrain.launch.nodes.secret import Secret
from dtrain.launch.nodes.wire import Wire
from dtrain.tools.doctor import cores, network
from dtrain.tools.doctor.cluster import check_environment, check_task
from dtrain.tools.doctor.finding import guarded
from dtrain.tools.doctor.folder import measure_writes, scratch
from dtrain.tools.doctor.gpus import check_gpus, find_gpus
from dtrain.tools.doctor.nodes.cluster_report import Answer
from dtrain.tools.doctor.nodes.echo import Echo, Peer, reach_all
from dtrain.tools.doctor.ranks import rank_words
from dtrain.tools.doctor.versions import check_versions, versions

_POLL, _CONNECT_SECONDS = 0.02, 5.0
# An NFS client may keep what it knows of a folder for 30 s; a folder that is not there at all will not come.
_READ_SECONDS, _FOLDER_SECONDS = 40.0, 4.0
_HANG, _TIMEOUT = 60.0, 60.0
TOKEN = "token-"  # noqa: S105 - a file's name


def serve_node(meet: list[str], secret: Secret, folder: Path) -> int:
    """Does one node's part.

    Args:
        meet: HOST:PORT of the host, by all its names; the first that answers is taken.
        secret: what the host and the tasks know, and nobody else.
        folder: what all nodes should see.

    Returns:
        the exit code: 0, or 1 where the host cannot be reached.
    """
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    facts = introduce(name)  # it takes its time, and the host waits for a greeting for some seconds only
    wire, trouble = _connect(meet, secret)
    if wire is None:
        print(f"dtrain doctor: {name} cannot reach the first node: {trouble}", flush=True)  # noqa: T201
        return 1
    with contextlib.closing(wire), contextlib.closing(Echo(name, _token(secret))) as echo:
        node = _Node(name, secret, folder)
        wire.send({"hello": {**facts, "trouble": trouble, "port": echo.port}})
        while wire.lost is None:
            for message in wire.receive(1.0):
                if message["do"] == "end":
                    return 0
                wire.send({"id": message["id"], "answer": node.work(message["do"], message["with"])})
    return 1


def _token(secret: Secret) -> str:
    """Returns what is shown to a node that is asked whether it can be reached; it travels as it is."""
    return secret.key("echo").hex()


def _connect(meet: list[str], secret: Secret) -> tuple[Wire | None, str]:
    """Returns the connection to the host, and what was wrong with its names before."""
    trouble: list[str] = []
    for place in meet:
        host, _, port = place.rpartition(":")
        try:
            address = network.bounded(partial(socket.gethostbyname, host), _CONNECT_SECONDS)
            wire = Wire(socket.create_connection((address, int(port)), _CONNECT_SECONDS))
            if prove(wire, secret.key("doctor"), _CONNECT_SECONDS):
                return wire, "; ".join(trouble)
            wire.close()
            trouble.append(f"{place}: another program listens there")
        except (OSError, UnicodeError, network.LateError) as error:
            trouble.append(f"{place}: {(getattr(error, 'strerror', None) or str(error)).lower()}")
    return None, "; ".join(trouble)


def introduce(name: str) -> Answer:
    """Returns what a node says of itself.

    Args:
        name: SLURM's for it.
    """
    gpus = find_gpus()
    return {
        "node": name,
        "host": socket.gethostname(),
        "versions": versions(),
        "cores": usable_cores(),
        "gpus": len(gpus.listed),
        "visible": gpus.visible,
        "models": str(gpus),
        "gpu_trouble": gpus.trouble,
    }


class _Node:
    """What this node can be asked for; each answer is a mapping."""

    def __init__(self, name: str, secret: Secret, folder: Path) -> None:
        self._name, self._secret, self._folder = name, secret, folder
        self._work: dict[str, Callable[..., Answer]] = {
            "clock": self._clock,
            "machine": self._machine,
            "write": self._write,
            "read": self._read,
            "lock": self._lock,
            "reach": self._reach,
            "port": self._port,
            "ranks": self._ranks,
        }

    def work(self, what: str, more: Answer) -> Answer:
        return self._work[what](**more)

    def _clock(self) -> Answer:
        return {"now": time.time()}

    def _machine(self, ranks: int, nodes: int, wandb: bool) -> Answer:
        found = [
            check_task(nodes, ranks),
            *(one for one in (check_versions(), check_gpus(find_gpus())) if one.state in ("warn", "fail")),
            guarded(cores.CORES, lambda: cores.check_cores(ranks)),
            guarded(cores.MEMORY, lambda: cores.check_memory(ranks)),
            guarded(cores.SHARED, cores.check_shared_memory),
            guarded(cores.FILES, cores.check_open_files),
            guarded(cores.TEMPORARY, cores.check_temporary),
            guarded(network.HOST_NAME, network.check_host_name),
            guarded("environment", check_environment),
            *([network.check_wandb()] if wandb else []),
        ]
        return {"findings": [asdict(one) for one in found]}

    def _write(self) -> Answer:
        """Writes this node's token into the folder, and measures how fast it writes there."""
        token = secrets.token_hex(8)
        path = self._folder / f"{TOKEN}{self._name}"
        try:
            write_below(self._folder, path.name, token, sync=True)
            with scratch(self._folder) as work:
                written = measure_writes(work)
        except OSError as error:
            return {"error": (error.strerror or str(error)).lower()}
        return {"error": "", "token": token, "speed": written.bytes_per_second, "sync": written.sync}

    def _read(self, tokens: dict[str, str]) -> Answer:
        """Waits for the others' tokens; a network file system may take some seconds to show them."""
        began = time.monotonic()
        found: dict[str, float | None] = dict.fromkeys(tokens)
        while None in found.values():
            if time.monotonic() > began + (_READ_SECONDS if self._folder.is_dir() else _FOLDER_SECONDS):
                break
            for node in [node for node, when in found.items() if when is None]:
                if _content(self._folder / f"{TOKEN}{node}") == tokens[node]:
                    found[node] = time.monotonic() - began
            time.sleep(_POLL)
        return {"read": found}

    def _lock(self) -> Answer:
        """Tries to lock the file that the host has locked."""
        try:
            with (self._folder / "lock").open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return {"lock": "held"}
        except OSError as error:
            return {"lock": f"none: {(error.strerror or str(error)).lower()}"}
        return {"lock": "taken"}

    def _reach(self, peers: list[Answer]) -> Answer:
        return {"reach": dict(reach_all([Peer(**peer) for peer in peers], _token(self._secret)))}

    def _port(self) -> Answer:
        return {"port": free_port("")}

    def _ranks(self, cpu: bool, host: str, **numbers: int) -> Answer:
        """Starts this node's ranks, by dtrain's own launcher."""
        from dtrain.launch.supervisor import dtrain_argv, run_job

        environment = {"ACCELERATE_USE_CPU": "true"} if cpu else {}
        mine = Job(
            ranks=numbers["ranks"],
            nodes=numbers["nodes"],
            node_rank=numbers["node_rank"],
            host=host,
            rdzv_port=numbers["rdzv_port"],
            timeout=_TIMEOUT,
            environment=environment,
            hang_seconds=_HANG,
            secret=self._secret,
        )
        with tempfile.TemporaryDirectory(prefix="dtrain-doctor-") as folder:
            out = Path(folder) / "measured.json"
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    ending = run_job(dtrain_argv(rank_words(out, cpu)), mine, relayed=True)
            except WorldError as error:
                return {"code": error.exit_code, "text": str(error), "measured": None}
            measured = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None
        return {"code": ending.exit_code, "text": ending.text or said.getvalue()[-2000:], "measured": measured}


def _content(path: Path) -> str | None:
    """Returns a file's text; listing the folder first makes a network file system look anew."""
    try:
        os.listdir(path.parent)  # noqa: PTH208
        return path.read_text()
    except OSError:
        return None
