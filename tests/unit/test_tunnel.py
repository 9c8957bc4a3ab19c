"""The way to rank 0's store: bytes come through whole and in order, for those alone who know the key."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
import pytest
from torch.distributed import DistError, TCPStore

from dtrain.distributed.store import open_store
from dtrain.errors import WorldError
from dtrain.launch.env import ports
from dtrain.launch.env.ports import free_port, is_foreign, uid_of_peer
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.nodes import tunnel
from dtrain.launch.nodes.secret import RanksKey
from dtrain.launch.nodes.tunnel import Entrance, Exit, Relay

KEY = b"k" * 32


@contextlib.contextmanager
def echo() -> Iterator[tuple[str, int]]:
    """A service that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            while data := caller.recv(1 << 16):
                caller.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        listener.close()


@contextlib.contextmanager
def ways(service: tuple[str, int], key: bytes = KEY, seconds: float = 10) -> Iterator[Entrance]:
    listener = socket.create_server(("127.0.0.1", 0))
    entrance = Entrance(listener.getsockname(), key, seconds)
    with contextlib.closing(entrance), contextlib.closing(Exit(listener, KEY, service)):
        yield entrance


def sent_back(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
        writer = threading.Thread(target=caller.sendall, args=(data,))
        writer.start()
        back = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while len(back) < len(data) and (part := caller.recv(1 << 16)):
                back += part
        writer.join()
        return bytes(back)


def test_much_comes_through_whole_on_many_connections_at_once() -> None:
    with echo() as service, ways(service) as entrance:
        data = [os.urandom(size) for size in (1, 100, 3 << 20, 70_000, *range(2000, 2012))]
        with ThreadPoolExecutor(len(data)) as pool:
            back = list(pool.map(lambda one: sent_back(entrance.port, one), data))
        assert back == data
        assert entrance.trouble == ""


def test_the_end_of_one_side_ends_the_other() -> None:
    with echo() as service, ways(service) as entrance:
        for _ in range(3):
            assert sent_back(entrance.port, b"x") == b"x"
        deadline = time.monotonic() + 60
        while entrance._relay._other and time.monotonic() < deadline:
            time.sleep(0.01)
        assert entrance._relay._other == {}


def test_without_the_key_nothing_gets_through() -> None:
    with echo() as service, ways(service, b"another", seconds=0.5) as entrance:
        assert sent_back(entrance.port, b"x") == b""
        assert "does not know this job's key" in entrance.trouble


def test_another_user_of_the_machine_gets_nothing_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with echo() as service, ways(service) as entrance:
        monkeypatch.setattr(ports, "uid_of_peer", lambda _: os.geteuid() + 1)
        assert sent_back(entrance.port, b"x") == b""


def reset(port: int, data: bytes) -> None:
    """Sends something and resets the connection, as a port scan does."""
    caller = socket.create_connection(("127.0.0.1", port), timeout=20)
    caller.sendall(data)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    caller.close()


def test_a_connection_that_is_reset_is_not_carried_and_the_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[socket.socket] = []
    looked: list[bool] = []

    def once_it_is_reset(connection: socket.socket) -> bool:
        if not looked:
            looked.append(True)
            poll = select.poll()
            poll.register(connection, 0)  # wakes up by the reset alone
            assert poll.poll(20_000)
        return is_foreign(connection)

    monkeypatch.setattr(tunnel, "is_foreign", once_it_is_reset)
    with echo() as service, ways(service) as entrance:
        monkeypatch.setattr(entrance._relay, "add", lambda *pair: (carried.append(pair[0]), Relay.add(relay, *pair)))
        relay = entrance._relay
        reset(entrance.port, b"set a key")
        assert sent_back(entrance.port, b"x") == b"x"
        assert len(carried) == 1
        assert entrance._thread.is_alive()


def test_the_user_at_the_other_end_is_known() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.enter_context(socket.create_connection(listener.getsockname()))
        assert uid_of_peer(stack.enter_context(listener.accept()[0])) == os.geteuid()


def test_ranks_of_two_machines_share_a_store_that_no_other_client_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    limit = timedelta(seconds=20)
    kept: list[Entrance | Exit] = []
    monkeypatch.setattr("dtrain.distributed.store._ways", kept)
    first = open_store(RankFacts(0, 2, 0, 1, launched=True), limit, RanksKey(KEY, private=True))
    (way,) = kept
    kept.clear()  # rank 1 is in this process too
    try:
        second = open_store(RankFacts(1, 2, 0, 1, launched=True), limit, RanksKey(KEY, private=True))
        first.store.set("a", "b")
        assert second.store.get("a") == b"b"
        assert first.for_group is first.store
        with pytest.raises(DistError):
            TCPStore("127.0.0.1", port, None, False, timedelta(seconds=1), wait_for_workers=False)
        kept.pop().close()
        with pytest.raises(WorldError, match=r"rank 1 did not find rank 0 at .*does not know this job's key"):
            open_store(RankFacts(1, 2, 0, 1, launched=True), timedelta(seconds=1), RanksKey(b"another", private=True))
    finally:
        for one in (way, *kept):
            one.close()


def listening_at(port: int) -> set[str]:
    """The addresses at which this process listens on a port."""
    found = psutil.Process().net_connections("tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


@pytest.mark.parametrize("takes_a_socket", [True, False])
def test_the_store_of_one_machine_listens_on_its_address_alone_or_says_that_it_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, takes_a_socket: bool
) -> None:
    def of_another_torch(*args: Any, **named: Any) -> TCPStore:
        if "master_listen_fd" in named:
            raise TypeError("__init__(): incompatible constructor arguments")
        return TCPStore(*args, **named)

    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    if not takes_a_socket:
        monkeypatch.setattr("dtrain.distributed.store.TCPStore", of_another_torch)
    opened = open_store(RankFacts(0, 1, 0, 1, launched=True), timedelta(seconds=20), RanksKey(KEY, private=True))
    opened.store.set("a", "b")
    assert opened.store.get("a") == b"b"
    assert (listening_at(port) == {"127.0.0.1"}) is takes_a_socket
    assert ("listens on all addresses" in caplog.text) is not takes_a_socket
    assert f"port {port} can read" in caplog.text or takes_a_socket
