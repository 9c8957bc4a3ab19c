"""Who may see the served page: whoever has the token of the address that was printed, as with a notebook server.

::

    GET /?token=TOKEN           ->  a cookie, and a redirect to / : no token in the browser's address bar or Referer
    GET /        with the cookie ->  the page
    GET anything else            ->  403, with words that say where the token is
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from email.message import Message
from urllib.parse import parse_qsl

_PARAMETER = "token"
_BYTES = 24  # of randomness


class Access:
    """The token of one server, and the cookie that stands for it.

    Args:
        wanted: whether a token is asked for; else everybody who reaches the server has access.

    Attributes:
        token: the token; empty where none is asked for.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self.token = secrets.token_urlsafe(_BYTES) if wanted else ""
        # The cookie is no use as a token, and is worth nothing once this server has ended.
        self._session = hashlib.sha256(b"session" + secrets.token_bytes(_BYTES)).hexdigest()

    def query(self) -> str:
        """Returns what follows the page's path in the printed address."""
        return f"?{_PARAMETER}={self.token}" if self.token else ""

    def allows(self, headers: Message[str, str], port: int) -> bool:
        """Whether a request may have an answer.

        Args:
            headers: of the request; the cookie, or `Authorization: Bearer TOKEN`, as programs send it.
            port: where the server listens; cookies are the same for all ports of a host, so that their names differ.
        """
        if not self.token:
            return True
        scheme, _, given = (headers.get("Authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and _equal(given.strip(), self.token):
            return True
        return any(_equal(value, self._session) for value in _cookies(headers, _cookie_name(port)))

    def given(self, path: str) -> bool:
        """Whether a request's path has the token as a parameter."""
        values = [value for name, value in parse_qsl(path.partition("?")[2]) if name == _PARAMETER]
        return bool(self.token) and any(_equal(value, self.token) for value in values)

    def cookie(self, port: int) -> str:
        """Returns the Set-Cookie header of a browser that has shown the token; it ends with the browser."""
        # Lax: the first visit may come by a link on another page, such as a terminal in the browser.
        return f"{_cookie_name(port)}={self._session}; HttpOnly; SameSite=Lax; Path=/"


def refusal(command: str) -> str:
    """Returns the words for a request without a token."""
    return (
        "This page needs a token. Open the address printed by the command, with its ?token=...; each start of the "
        f"server creates a new token. On a machine that you do not share: {command} --no-token.\n"
    )


def _cookie_name(port: int) -> str:
    return f"dtrain-report-{port}"


def _cookies(headers: Message[str, str], name: str) -> list[str]:
    pairs = [part.strip().partition("=") for part in (headers.get("Cookie") or "").split(";")]
    return [value for key, _, value in pairs if key == name]


def _equal(given: str, wanted: str) -> bool:
    """Compares in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())
