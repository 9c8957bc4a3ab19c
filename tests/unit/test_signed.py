"""What has a wrong signature is not believed: ranks' entries, launchers' lines, the page's token."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from email.message import Message

import pytest

from dtrain.distributed.handshake import SignedEntries
from dtrain.launch.nodes.wire import Wire
from dtrain.report.access import Access

KEY, OTHER = b"k" * 32, b"o" * 32
SAID = {"rank": 1, "host": "node1", "pid": 7, "device": None, "same": {"number of ranks": "2", "config lr": "'0.1'"}}


def changed(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def test_a_rank_s_entry_is_believed_only_as_it_was_signed() -> None:
    mine = SignedEntries(SAID, KEY, "round")
    raw = mine.text().encode()
    assert mine.read(raw) == SAID
    assert SignedEntries(SAID, OTHER, "round").read(raw) is None
    assert SignedEntries(SAID, KEY, "another round").read(raw) is None
    assert mine.read(raw.replace(b'"rank": 1', b'"rank": 0')) is None
    for place in (0, 31, 63, 64, 70, len(raw) - 1):
        assert mine.read(changed(raw, place)) is None


def test_a_verdict_is_believed_only_as_rank_0_has_signed_it() -> None:
    mine = SignedEntries(SAID, KEY, "round")
    raw = mine.signed("all is well")
    assert mine.opened(raw) == "all is well"
    assert SignedEntries(SAID, OTHER, "round").opened(raw) is None
    assert mine.opened(mine.text().encode()) is None
    for place in (0, 63, 64, len(raw) - 1):
        assert mine.opened(changed(raw, place)) is None


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, Wire, list[bytes]]]:
    """A stranger's socket on the way to a wire, and two lines that the wire's peer has signed."""
    ours, theirs = socket.create_server(("127.0.0.1", 0)), []
    with ours:
        stranger = socket.create_connection(ours.getsockname())
        wire = Wire(ours.accept()[0])
        sender = Wire(socket.create_connection(ours.getsockname()))
        taken = ours.accept()[0]
    wire.authenticate(OTHER, KEY)
    sender.authenticate(KEY, OTHER)
    for number in (1, 2):
        sender.send({"number": number})
        theirs.append(taken.recv(1 << 16))
    try:
        yield stranger, wire, theirs
    finally:
        for one in (stranger, taken, wire, sender):
            one.close()


def test_lines_that_the_peer_has_signed_arrive_in_their_order(line: tuple[socket.socket, Wire, list[bytes]]) -> None:
    stranger, wire, (first, second) = line
    stranger.sendall(first + second)
    assert wire.receive(10) == [{"number": 1}, {"number": 2}]
    assert wire.lost is None


@pytest.mark.parametrize("kind", ["changed", "unsigned", "out of order", "again"])
def test_a_line_that_is_not_the_peers_next_one_ends_the_connection(
    line: tuple[socket.socket, Wire, list[bytes]], kind: str
) -> None:
    stranger, wire, (first, second) = line
    sent = {
        "changed": first.replace(b"1}", b"3}"),
        "unsigned": b'{"number": 1}\n',
        "out of order": second,
        "again": first + first,
    }
    stranger.sendall(sent[kind])
    assert wire.receive(10) == ([{"number": 1}] if kind == "again" else [])
    assert wire.lost == "it speaks another protocol"


def headers(**given: str) -> Message:
    message = Message()
    for name, value in given.items():
        message[name] = value
    return message


def test_only_the_token_of_this_server_opens_the_page() -> None:
    access, other = Access(), Access()
    assert access.given(f"/?token={access.token}")
    assert access.allows(headers(Authorization=f"Bearer {access.token}"), 80)
    cookie = access.cookie(80).partition(";")[0]
    assert access.allows(headers(Cookie=cookie), 80)
    for token in ("", "x", access.token[:-1], access.token + "x", other.token):
        assert not access.given(f"/?token={token}")
        assert not access.allows(headers(Authorization=f"Bearer {token}"), 80)
        assert not access.allows(headers(Cookie=f"dtrain-report-80={token}"), 80)
    assert not access.allows(headers(Cookie=other.cookie(80).partition(";")[0]), 80)
    assert not access.allows(headers(Cookie=cookie), 81)
    assert not access.allows(headers(), 80)
