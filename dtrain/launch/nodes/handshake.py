"""How two launchers prove to each other that they know one secret, before either believes anything that the other says.

::

    follower: "I am here", with random digits of its own
    host:  random digits of its own, and the HMAC of both by the secret: only who knows it can answer a guest's digits
    both:  make a key for each direction from the secret and both digits; every line has a MAC from here on
    follower: what it says of itself: only who knows the secret can answer the host's digits

The words "host" and "guest" and the protocol's number are in each HMAC, so that no answer can be sent back or used for
another purpose. Without a secret the same is done with a key that everybody can make.
"""

from __future__ import annotations

import hmac
import secrets
import time
from typing import Any

from dtrain.launch.nodes.messages import NONCE_DIGITS, PROTOCOL, Challenge, Greeting, MessageError
from dtrain.launch.nodes.secret import derive
from dtrain.launch.nodes.wire import LONGEST, Wire

LONGEST_GREETING = 4096  # bytes of a line before the peer is known
_POLL_SECONDS = 0.1
_PROTOCOL = f"rdzv {PROTOCOL}"


def new_nonce() -> str:
    """Returns random digits that were never used before."""
    return secrets.token_hex(NONCE_DIGITS // 2)


def greet(wire: Wire) -> Greeting:
    """Says the first word, as a guest; returns what was said, for `check_challenge`."""
    greeting = Greeting(new_nonce())
    wire.send({"rdzv": PROTOCOL, "nonce": greeting.nonce})
    return greeting


def challenge(wire: Wire, key: bytes, message: object) -> None:
    """Answers a guest's first word, as the host; from then on each line has a MAC.

    Raises:
        MessageError: it is no greeting.
    """
    greeting = Greeting.of(message)
    nonce = new_nonce()
    wire.send({"nonce": nonce, "proof": _proof(key, greeting.nonce, nonce)})
    wire.authenticate(*_keys(key, greeting.nonce, nonce))


def check_challenge(wire: Wire, key: bytes, greeting: Greeting, message: dict[str, Any]) -> bool:
    """Whether the host knows the secret; from then on each line has a MAC.

    Raises:
        MessageError: the answer is none.
    """
    answer = Challenge.of(message)
    if not hmac.compare_digest(answer.proof, _proof(key, greeting.nonce, answer.nonce)):
        return False
    host, follower = _keys(key, greeting.nonce, answer.nonce)
    wire.authenticate(follower, host)
    wire.longest = LONGEST
    return True


def prove(wire: Wire, key: bytes, seconds: float) -> bool:
    """Whether the host knows the key; takes a guest's part to the point where it may say what it has to say.

    Args:
        wire: a new connection to it.
        key: what both know.
        seconds: how long the host may take to answer.
    """
    greeting, deadline = greet(wire), time.monotonic() + seconds
    while wire.lost is None and time.monotonic() < deadline:
        for message in wire.receive(_POLL_SECONDS):
            try:
                return check_challenge(wire, key, greeting, message)
            except MessageError:
                return False
    return False


def _proof(key: bytes, follower: str, host: str) -> str:
    return derive(key, _PROTOCOL, "host knows", follower, host).hex()


def _keys(key: bytes, follower: str, host: str) -> tuple[bytes, bytes]:
    """Returns the keys of what the host sends and of what the guest sends."""
    return derive(key, _PROTOCOL, "host sends", follower, host), derive(key, _PROTOCOL, "guest sends", follower, host)
