"""What launchers say to each other, as a closed schema: all that another kind, or another length, would be is refused.

Peers set numbers, one word that tells the job from others, and text that people read. No setting and no variable of
the environment ever travels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dtrain.launch.monitor.postmortem import RankFailure

PROTOCOL = 2
NONCE_DIGITS = 32
_HEX = re.compile(r"[0-9a-f]+")
_RANK = re.compile(r"0|[1-9][0-9]{0,8}")
_MOST = 1 << 30
_TEXT, _SHORT = 1 << 16, 1 << 12
_ENTRIES = 1 << 16
_REFUSALS = ("differs", "running", "taken", "late")


class MessageError(ValueError):
    """A message that no launcher sends."""


@dataclass(frozen=True)
class ExitMessage:
    """How one node's part of the job ended.

    Attributes:
        node: which node.
        exit_code: 0 where all its ranks ended well.
        text: what a person shall read of it; empty where it ended well, or because of another part.
        when: seconds since the epoch.
        lost: whether it is another node that says so, since this one is gone.
        failure: what `failure.json` shall hold of it; None where there is nothing.
        ended: rank -> how it ended, of this node's ranks.
    """

    node: int
    exit_code: int
    text: str
    when: float
    lost: bool = False
    failure: dict[str, Any] | None = None
    ended: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[bool, float]:
        """What comes first is the cause: what tells of nothing but another rank's end comes last."""
        return self.failure is not None and RankFailure(**self.failure).echo, self.when

    def message(self) -> dict[str, Any]:
        """Returns it as it is sent; text that is too long keeps its end, which names the cause."""
        short = replace(self, text=self.text[-_TEXT:], ended=_shortened(self.ended))
        if self.failure is not None:
            texts: dict[str, Any] = {
                name: value[-_SHORT:] for name, value in self.failure.items() if isinstance(value, str)
            }
            texts["traceback"] = str(self.failure.get("traceback", ""))[-_TEXT:]
            texts["others"] = _shortened(self.failure.get("others") or {})
            if self.failure.get("exception"):
                texts["exception"] = _shortened(self.failure["exception"])
            short = replace(short, failure=self.failure | texts)
        return asdict(short)


def _shortened(told: Mapping[str, str]) -> dict[str, str]:
    return {name[:_SHORT]: value[-_SHORT:] for name, value in told.items()}


def exit_message_of(message: object, nodes: int) -> ExitMessage:
    """Returns the word that a message holds.

    Args:
        message: what came.
        nodes: number of nodes of the job.

    Raises:
        MessageError: it is none.
    """
    given = _fields(message, {one.name for one in fields(ExitMessage)})
    failure = given["failure"]
    return ExitMessage(
        node=_number(given["node"], 0, nodes - 1),
        exit_code=_number(given["exit_code"], -255, 255),
        text=_text(given["text"], _TEXT),
        when=_real(given["when"]),
        lost=_truth(given["lost"]),
        failure=None if failure is None else asdict(_failure(failure)),
        ended=_by_rank(given["ended"]),
    )


def _failure(message: object) -> RankFailure:
    given = _fields(message, {one.name for one in fields(RankFailure)})
    return RankFailure(
        rank=_number(given["rank"], 0, _MOST),
        local_rank=_number(given["local_rank"], 0, _MOST),
        host=_text(given["host"]),
        device=_or_none(_text, given["device"]),
        epoch=_or_none(_number, given["epoch"]),
        step=_or_none(_number, given["step"]),
        phase=_text(given["phase"]),
        cause=_text(given["cause"]),
        exception=_or_none(_exception, given["exception"]),
        traceback=_text(given["traceback"], _TEXT),
        others=_by_rank(given["others"]),
        checkpoint=_or_none(_text, given["checkpoint"]),
        resume=_or_none(_text, given["resume"]),
    )


def _exception(message: object) -> dict[str, str]:
    return _texts(message, _text)


def _by_rank(message: object) -> dict[str, str]:
    def rank(name: object) -> str:
        if not isinstance(name, str) or not _RANK.fullmatch(name):
            raise MessageError
        return name

    return _texts(message, rank)


def _texts(message: object, name_of: Callable[[object], str]) -> dict[str, str]:
    if not isinstance(message, dict) or len(message) > _ENTRIES:
        raise MessageError
    return {name_of(name): _text(value) for name, value in message.items()}


@dataclass(frozen=True)
class Greeting:
    """The first thing that a guest says.

    Attributes:
        nonce: random digits of its own.
    """

    nonce: str

    @classmethod
    def of(cls, message: object) -> Greeting:
        """Returns the greeting that a message is; raises MessageError."""
        given = _fields(message, {"rdzv", "nonce"})
        _number(given["rdzv"], PROTOCOL, PROTOCOL)
        return cls(_digits(given["nonce"], NONCE_DIGITS))


@dataclass(frozen=True)
class Challenge:
    """What the host answers.

    Attributes:
        nonce: random digits of its own.
        proof: that it knows the secret.
    """

    nonce: str
    proof: str

    @classmethod
    def of(cls, message: object) -> Challenge:
        """Returns the challenge that a message is; raises MessageError."""
        given = _fields(message, {"nonce", "proof"})
        return cls(_digits(given["nonce"], NONCE_DIGITS), _digits(given["proof"], 64))


@dataclass(frozen=True)
class Hello:
    """What a guest says of itself, with a MAC: so it proves that it knows the secret too.

    Attributes:
        node: which node it is; -1 where it is to get a number.
        about: what must be the same on all nodes.
    """

    node: int
    about: dict[str, str]

    @classmethod
    def of(cls, message: object) -> Hello:
        """Returns the hello that a message is; raises MessageError."""
        given = _fields(message, {"node", "hello"})
        about = given["hello"]
        if not isinstance(about, dict) or len(about) > 64:
            raise MessageError
        return cls(_number(given["node"], -1, _MOST), {_text(k, 200): _text(v, 1000) for k, v in about.items()})


@dataclass(frozen=True)
class StartMessage:
    """What makes the nodes one job.

    Attributes:
        port: that of rank 0's store.
        nonce: tells this job from any other.
        node_rank: the guest's number.
    """

    port: int
    nonce: str
    node_rank: int

    @classmethod
    def of(cls, message: object, nodes: int) -> StartMessage:
        """Returns the start that a message is; raises MessageError."""
        given = _fields(message, {"port", "nonce", "node_rank"})
        node = _number(given["node_rank"], 1, nodes - 1)
        return cls(_number(given["port"], 1, 65535), _digits(given["nonce"], NONCE_DIGITS), node)


@dataclass(frozen=True)
class Refusal:
    """Why a guest, or all, cannot take part.

    Attributes:
        why: differs, running, taken or late.
        node: the guest's number, or which nodes are late.
        name: what differs; "" else, and where the guest does not know of such a thing.
        theirs: the first node's value of it; None where that is not for everybody.
    """

    why: str
    node: int = 0
    name: str = ""
    theirs: str | None = None
    missing: tuple[int, ...] = ()

    def message(self) -> dict[str, Any]:
        """Returns it as it is sent."""
        return {**asdict(self), "missing": list(self.missing)}

    @classmethod
    def of(cls, message: object, nodes: int) -> Refusal:
        """Returns the refusal that a message is; raises MessageError."""
        given = _fields(message, {one.name for one in fields(cls)})
        missing = given["missing"]
        if given["why"] not in _REFUSALS or not isinstance(missing, list) or len(missing) > nodes:
            raise MessageError
        numbers = tuple(_number(one, 0, nodes - 1) for one in missing)
        theirs = _or_none(_text, given["theirs"])
        return cls(given["why"], _number(given["node"], 0, _MOST), _text(given["name"], 200), theirs, numbers)


def seconds_of(message: object, most: float) -> float:
    """Returns a number of seconds, 0 to a most; raises MessageError."""
    value = _real(message)
    if value > most:
        raise MessageError
    return value


def _fields(message: object, names: set[str]) -> dict[str, Any]:
    if not isinstance(message, dict) or set(message) != names:
        raise MessageError
    return message


def _number(value: object, low: int = 0, high: int = _MOST) -> int:
    if type(value) is not int or not low <= value <= high:
        raise MessageError
    return value


def _real(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < 1e12:  # type: ignore[arg-type,operator]
        raise MessageError
    return float(value)  # type: ignore[arg-type]


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise MessageError
    return value


def _text(value: object, longest: int = _SHORT) -> str:
    """Returns text that a terminal and a file take as such: no control characters, no half characters."""
    if not isinstance(value, str) or len(value) > longest:
        raise MessageError
    return "".join(char if char in "\n\t" or _is_plain(char) else "?" for char in value)


def _is_plain(char: str) -> bool:
    code = ord(char)
    return code >= 0x20 and not 0x7F <= code < 0xA0 and not 0xD800 <= code <= 0xDFFF


def _digits(value: object, count: int) -> str:
    if not isinstance(value, str) or len(value) != count or not _HEX.fullmatch(value):
        raise MessageError
    return value


def _or_none(parse: Callable[[object], Any], value: object) -> Any:
    return None if value is None else parse(value)
