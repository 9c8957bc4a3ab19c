"""Which values are secrets, and what stands in their place wherever a config is shown, sent or stored.

A value is a secret where its key says so (`data.api_key`, `data.password`), where the recipe marks it
(`secrets = ["data.dsn"]`), and where a URL has a password in it. A number, true or false, and nothing at all are none.
What stands in its place is `***`. The values themselves are in one file of the run's folder, `secrets.json`, which its
owner alone can read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "***"
HIDDEN = "DTRAIN_HIDDEN"  # for ranks: the values that their command line, which every user can see, leaves out

_SURE = {
    *("password", "passwords", "passwd", "pwd", "passphrase", "secret", "secrets", "credential", "credentials"),
    *("apikey", "accesskey", "secretkey", "privatekey", "authkey", "authtoken", "accesstoken", "bearer"),
}
# `key` alone is as often the name of a column; with one of these before it, it is none.
_KEYS = {"api", "access", "secret", "private", "auth", "encryption", "signing", "account", "license", "ssh", "master"}
# `token` is a secret, but not those of a vocabulary.
_OF_TEXT = {
    *("pad", "mask", "bos", "eos", "unk", "cls", "sep", "special", "start", "end", "stop", "begin", "image", "audio"),
    *(
        "video",
        "system",
        "user",
        "assistant",
        "prefix",
        "suffix",
        "middle",
        "separator",
        "sentinel",
        "decoder",
        "blank",
    ),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LIKE_A_NAME = re.compile(r"[A-Za-z_][A-Za-z_ .]*\d{0,3}")  # of a column, say
_NO_SECRET = re.compile(r"[-+]?[\d._]*(?:[eE][-+]?\d+)?|true|false|null|~", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)([^\s/:@]*):([^\s/@]+)@")
_LEAST = 4  # characters of a value that is looked for in texts

_marked: set[str] = set()  # of this process, as its recipe says
_values: set[str] = set()


def mark(keys: Iterable[str]) -> None:
    """Has further keys taken for those of secrets, in this process."""
    _marked.update(keys)


def is_secret(key: str, value: Any) -> bool:
    """Whether a value is a secret.

    Args:
        key: dotted, or a leaf's own name.
        value: of any kind; texts alone can be secrets.
    """
    if not isinstance(value, str) or _NO_SECRET.fullmatch(value):
        return False
    return _is_sure(key) or (_may_be(key) and not _is_plain(value))


def masked(key: str, value: Any) -> Any:
    """Returns a value with what is secret of it masked, at any depth.

    Args:
        key: dotted.
        value: as YAML has it.
    """
    if isinstance(value, Mapping):
        return {name: masked(f"{key}.{name}" if key else str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(key, inner) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if value.startswith(MASK):
        return value
    if is_secret(key, value):
        # What may be no secret, but a column's name, is still compared when a run goes on: by 16 bits of a hash.
        return MASK if _is_sure(key) else f"{MASK}{hashlib.blake2b(value.encode(), digest_size=2).hexdigest()}"
    return _IN_URL.sub(rf"\1:{MASK}@", value)


def note(key: str, value: Any) -> None:
    """Remembers the secrets of a value, so that `redacted` finds them in texts."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            note(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            note(key, inner)
    elif isinstance(value, str) and masked(key, value) != value:
        in_url = _IN_URL.search(value)
        _values.add(value if is_secret(key, value) or in_url is None else in_url[2])


def redacted(text: str) -> str:
    """Returns a text, such as a message, without the secrets that this process knows."""
    for value in sorted(_values, key=len, reverse=True):
        if len(value) >= _LEAST:
            text = text.replace(value, MASK)
    return text


def hide(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Masks the words of a command line.

    Returns:
        the words, and key -> value as it was typed of those that are masked.
    """
    shown, hidden = [], {}
    for word in words:
        key, equals, raw = word.partition("=")
        key = key.strip()
        safe = masked(key, raw) if equals and re.fullmatch(r"[A-Za-z_][\w.]*", key) else raw
        if safe != raw:
            hidden[key] = raw
        shown.append(f"{key}={safe}" if safe != raw else word)
    return shown, hidden


def hidden_variables(hidden: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that bring hidden values to this machine's ranks: another user cannot read those."""
    return {HIDDEN: json.dumps({**_hidden_here(), **hidden})} if hidden else {}


def brought(key: str, raw: str) -> str:
    """Returns the value that a word of this process's command line stands for."""
    return _hidden_here().get(key, raw) if MASK in raw else raw


def restored(key: str, value: Any, kept: Mapping[str, Any]) -> Any:
    """Puts values back that were masked.

    Args:
        key: dotted.
        value: as a config of a run has it.
        kept: dotted key -> value, of `secrets.json`.
    """
    if isinstance(value, Mapping):
        return {name: restored(f"{key}.{name}", inner, kept) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return kept.get(key, value) if is_masked(key, value) else value
    return kept.get(key, value) if _has_mask(value) else value


def secrets_of(key: str, value: Any) -> dict[str, Any]:
    """Returns dotted key -> value of what `masked` changes in a value, for `restored`."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for name, inner in value.items():
            found |= secrets_of(f"{key}.{name}" if key else str(name), inner)
        return found
    return {key: value} if masked(key, value) != value else {}


def is_masked(key: str, value: Any) -> bool:
    """Whether a value is a mask that stands for nothing known."""
    if isinstance(value, Mapping):
        return any(is_masked(f"{key}.{name}", inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return any(is_masked(key, inner) for inner in value)
    return isinstance(value, str) and (_may_be(key) or _is_sure(key) or "://" in value) and _has_mask(value)


def _has_mask(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith(MASK) or f":{MASK}@" in value)


def _hidden_here() -> dict[str, str]:
    try:
        found = json.loads(os.environ.get(HIDDEN, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_sure(key: str) -> bool:
    if key in _marked or any(key.startswith(f"{one}.") or one.rpartition(".")[2] == key for one in _marked):
        return True
    return any(_names_secret([word.lower() for word in _WORD.findall(part)]) for part in key.split("."))


def _names_secret(words: list[str]) -> bool:
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _OF_TEXT
    return words[-1] in _SURE or (words[-1] == "key" and before in _KEYS)


def _may_be(key: str) -> bool:
    return key.rpartition(".")[2].lower() == "key"


def _is_plain(value: str) -> bool:
    """Whether a text is as a name is, rather than a secret: letters, and at most a number at its end."""
    return _LIKE_A_NAME.fullmatch(value) is not None
