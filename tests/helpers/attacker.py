"""A process on another host that sends what it likes to a job's ports: `python attacker.py HOST RDZV_PORT`.

It does one round when it starts, and another for each line on its input, which names the port of rank 0's store; of
each it prints what it has heard, as JSON. It holds its silent connections until its input ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from datetime import timedelta

from dtrain.launch.nodes.handshake import prove
from dtrain.launch.nodes.secret import Secret
from dtrain.launch.nodes.wire import Wire

SILENT = 150
GARBAGE = [
    b"\n", b"\0" * 4000, b"x" * 70_000, b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000 + b"\n", b"[1,2,3]\n", b"\xff\xfe\n",
    b'{"hello": {}}\n', b'{"hello": {}, "node": 1}\n', b'{"hello": {}, "node": 1e999}\n', b'{"hello": [], "node": "x"}\n',
    b'{"start": {"port": 9, "nonce": "n", "environment": {"A": "b"}}}\n', b'{"over": true}\n',
    b'{"rdzv": 2, "nonce": "00000000000000000000000000000000"}\n{"ended": {"node": 1}}\n',
    b'{"rdzv": 2, "nonce": "00000000000000000000000000000000"}\n',
]  # fmt: skip
held: list[socket.socket] = []


def attack(host: str, port: int, silent: int) -> list[str]:
    heard = []
    for _ in range(silent):
        with contextlib.suppress(OSError):
            held.append(socket.create_connection((host, port), timeout=5))
    for sent in GARBAGE:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.2) as caller:
            caller.sendall(sent)
            caller.shutdown(socket.SHUT_WR)
            heard.append(caller.recv(10_000).decode("latin-1"))
    return heard


def without_the_secret(host: str, port: int) -> bool:
    wire = Wire(socket.create_connection((host, port), timeout=5))
    with contextlib.closing(wire):
        return prove(wire, Secret().key("launchers"), 5)


def content_of_store(host: str, port: int) -> dict[str, str] | None:
    """All that a store's client reads there; None where it is not let in."""
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(host, port, None, False, timedelta(seconds=2), wait_for_workers=False)
        return {key: store.get(key).decode("latin-1") for key in store.list_keys()}
    except DistError:
        return None


def main(host: str, port: int) -> None:
    print(json.dumps({"heard": attack(host, port, SILENT), "known": without_the_secret(host, port)}), flush=True)
    for line in sys.stdin:
        store = int(line)
        report = {"heard": attack(host, port, SILENT), "store": content_of_store(host, store)}
        attack(host, store, 20)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
