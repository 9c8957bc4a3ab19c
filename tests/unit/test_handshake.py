"""Launchers prove to each other that they know a secret, and who does not gets nothing in: over real sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dtrain.launch.env import ports
from dtrain.launch.nodes import admission
from dtrain.launch.nodes.admission import MOST_WAITING, Admission
from dtrain.launch.nodes.handshake import challenge, check_challenge, greet, prove
from dtrain.launch.nodes.messages import Greeting, Hello
from dtrain.launch.nodes.wire import Wire

KEY_BYTES = b"k" * 32


@contextlib.contextmanager
def wires() -> Iterator[tuple[Wire, Wire]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = Wire(socket.create_connection(listener.getsockname()))
        second = Wire(listener.accept()[0])
        try:
            yield first, second
        finally:
            first.close()
            second.close()


def shaken(follower: Wire, host: Wire, keys: tuple[bytes, bytes] = (KEY_BYTES, KEY_BYTES)) -> bool:
    greeting = greet(follower)
    challenge(host, keys[1], host.receive(5)[0])
    return check_challenge(follower, keys[0], greeting, follower.receive(5)[0])


class Tap:
    """Stands in for a wire's socket and keeps what is sent."""

    def __init__(self, wire: Wire) -> None:
        self._socket, self.sent = wire._socket, b""
        wire._socket = self  # type: ignore[assignment]

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class TestHandshake:
    def test_with_one_key_both_may_speak(self) -> None:
        with wires() as (follower, host):
            assert shaken(follower, host)
            for number in range(3):
                follower.send({"n": number})
                host.send({"m": number})
                assert host.receive(5) == [{"n": number}]
                assert follower.receive(5) == [{"m": number}]

    @pytest.mark.parametrize("keys", [(b"x" * 32, KEY_BYTES), (KEY_BYTES, b"x" * 32)])
    def test_another_key_is_noticed_before_the_guest_has_said_anything(self, keys: tuple[bytes, bytes]) -> None:
        with wires() as (follower, host):
            assert not shaken(follower, host, keys)

    def test_a_guest_that_does_not_know_the_key_gets_nothing_in(self) -> None:
        with wires() as (follower, host):
            shaken(follower, host, (b"x" * 32, KEY_BYTES))
            follower.authenticate(b"x", b"y")
            follower.send({"hello": {}, "node": 1})
            assert host.receive(5) == []
            assert host.lost == "it speaks another protocol"

    @pytest.mark.parametrize("change", ["flip", "twice", "left out", "back", "plain"])
    def test_lines_that_were_changed_repeated_or_sent_back_are_refused(self, change: str) -> None:
        with wires() as (follower, host):
            assert shaken(follower, host)
            tap = Tap(follower)
            follower.send({"n": 1})
            follower.send({"n": 2})
            first, second = tap.sent.splitlines(keepends=True)
            lines = {
                "flip": first.replace(b'"n": 1', b'"n": 3'),
                "twice": first + first,
                "left out": second,
                "plain": b'{"n": 1}\n',
                "back": first,
            }[change]
            target = follower if change == "back" else host
            (host if change == "back" else tap._socket)._socket.sendall(
                lines
            ) if change == "back" else tap._socket.sendall(lines)
            assert target.receive(5) == ([{"n": 1}] if change == "twice" else [])
            assert target.lost == "it speaks another protocol"

    def test_a_recorded_session_is_of_no_use(self) -> None:
        with wires() as (follower, host):
            tap = Tap(follower)
            greeting = greet(follower)
            tap._socket.sendall(tap.sent)
            challenge(host, KEY_BYTES, host.receive(5)[0])
            assert check_challenge(follower, KEY_BYTES, greeting, follower.receive(5)[0])
            follower.send({"hello": {}, "node": 1})
            recorded = tap.sent.splitlines(keepends=True)
        with wires() as (follower, host):
            follower._socket.sendall(recorded[0])
            challenge(host, KEY_BYTES, host.receive(5)[0])
            follower._socket.sendall(recorded[1])
            assert host.receive(5) == []
            assert host.lost is not None

    def test_an_answer_of_a_host_serves_no_other_guest(self) -> None:
        with wires() as (follower, host):
            greet(follower)
            challenge(host, KEY_BYTES, host.receive(5)[0])
            assert not check_challenge(follower, KEY_BYTES, Greeting("0" * 32), follower.receive(5)[0])


@contextlib.contextmanager
def listening(*, by_user: bool = False) -> Iterator[tuple[Admission, Callable[[], socket.socket], list[str]]]:
    said: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    place = listener.getsockname()
    with (
        contextlib.closing(Admission(listener, KEY_BYTES, "a test", by_user=by_user, say=said.append)) as door,
        contextlib.ExitStack() as stack,
    ):
        yield door, lambda: stack.enter_context(socket.create_connection(place)), said


def rounds(door: Admission, until: Callable[[], bool], seconds: float = 60) -> list[Hello]:
    deadline, came = time.monotonic() + seconds, []
    while not until() and time.monotonic() < deadline:
        for wire, hello in door.followers(0.02, Hello.of):
            came.append(hello)
            wire.close()
    return came


class TestAdmission:
    def test_a_guest_gets_past_a_crowd_that_says_nothing(self) -> None:
        with listening() as (door, connect, said):
            for _ in range(3 * MOST_WAITING):
                connect()
                door.followers(0, Hello.of)
            rounds(door, lambda: len(door._callers) == MOST_WAITING and bool(said))
            follower = Wire(connect())

            def join() -> None:
                if prove(follower, KEY_BYTES, 10):
                    follower.send({"hello": {}, "node": 1})

            thread = threading.Thread(target=join)
            thread.start()
            came = rounds(door, lambda: not thread.is_alive()) + rounds(door, lambda: False, 0.3)
            thread.join()
            assert [hello.node for hello in came] == [1]
            assert len(door._callers) <= MOST_WAITING
            assert [text for text in said if "waited at once" in text] == said[:1], "once, and no other kind"
            follower.close()

    def test_one_that_is_slow_is_dropped_in_time_whatever_it_sends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(admission, "GREETING_SECONDS", 0.2)
        with listening() as (door, connect, said):
            slow = connect()
            slow.settimeout(5)
            slow.sendall(b'{"rdzv": 2')
            rounds(door, lambda: bool(said))
            assert slow.recv(1) == b""
            assert "did not identify itself" in said[0]

    @pytest.mark.parametrize(
        "sent",
        [b"\n", b"x" * 5000, b'{"hello": {}}\n', b"[" * 4000 + b"\n", b'{"rdzv": 1e999, "nonce": ""}\n', b"\xff\xfe\n"],
    )
    def test_garbage_is_dropped_with_one_warning_and_no_answer(self, sent: bytes) -> None:
        with listening() as (door, connect, said):
            callers = [connect() for _ in range(3)]
            for caller in callers:
                caller.sendall(sent)
            rounds(door, lambda: not door._callers and bool(said))
            for caller in callers:
                with contextlib.suppress(ConnectionResetError):
                    assert caller.recv(100) == b""
            assert len(said) == 1
            assert "it sent an invalid message" in said[0]

    def test_where_everybody_can_make_the_key_another_user_of_this_machine_is_dropped(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with listening(by_user=True) as (door, connect, said):
            mine = connect()
            rounds(door, lambda: bool(door._callers))
            monkeypatch.setattr(ports, "uid_of_peer", lambda _: os.geteuid() + 1)
            other = connect()
            rounds(door, lambda: bool(said))
            assert other.recv(1) == b""
            assert "it belongs to another user of this machine" in said[0]
            assert len(door._callers) == 1
            mine.close()

    def test_who_looks_for_open_ports_is_no_news(self) -> None:
        with listening() as (door, connect, said):
            connect().close()
            rounds(door, lambda: False, 0.2)
            assert (said, door.dropped, door._callers) == ([], [], {})

    @pytest.mark.parametrize("by_user", [True, False])
    def test_connections_that_are_reset_end_nothing(self, by_user: bool) -> None:
        """As a scan of ports makes them, before they are taken."""
        with listening(by_user=by_user) as (door, connect, said):
            for _ in range(3):
                caller = connect()
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                caller.close()
            mine = connect()
            rounds(door, lambda: bool(door._callers))
            rounds(door, lambda: len(door._callers) == 1)
            assert [caller.wire.peer for caller in door._callers.values()] == ["127.0.0.1"]
            assert (said, door.dropped) == ([], [])
            mine.close()

    def test_one_with_another_secret_hangs_up_at_the_answer_and_is_named(self) -> None:
        with listening() as (door, connect, said):
            guest = Wire(connect())
            proved: list[bool] = []

            def try_it() -> None:
                proved.append(prove(guest, b"another key".ljust(32), 10))
                guest.close()

            thread = threading.Thread(target=try_it)
            thread.start()
            rounds(door, lambda: bool(said))
            thread.join()
            assert proved == [False]
            assert "it hung up once this node had answered it: most likely a launcher with another secret" in said[0]
            assert door.dropped[0].startswith("127.0.0.1 hung up once this node had answered it")
