"""What each rank says of itself before the first step, and what must be the same on all of them.

Rank 0's store can be read by whoever reaches its port: of the config and the command line, it gets digests by the job's
key alone, and every entry has a MAC by which ranks of the job know it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain import __version__
from dtrain.config.flat import flatten
from dtrain.errors import WorldError
from dtrain.launch.env.fingerprint import code_hash, file_hash
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.env.slurm_env import NONCE
from dtrain.launch.nodes.secret import derive

RankInfo = dict[str, Any]

_JOB, _SIZE, _DEVICE = "the job", "the number of ranks", "the kind of device"
_VERSION, _CODE, _TORCH = "dtrain's version", "dtrain's code", "torch's version"
_REMEDIES = {
    _JOB: "another job uses this address: stop it, or use another port or --job-id",
    _SIZE: "start every node with the same number of nodes and ranks",
    _VERSION: "install the same dtrain on every node",
    _CODE: "install the same dtrain on every node",
    _TORCH: "install the same torch on every node",
    _DEVICE: "use the same kind of device for all ranks, or add --cpu on every node",
}
_OPEN = (_SIZE, _VERSION, _CODE, _TORCH, _DEVICE)  # sent as they are: nothing of the config or the command line
_CONTENT = "the content of "
_MAC_DIGITS, _DIGEST_DIGITS = 64, 24
_LONGEST = 1 << 20


def rank_info(facts: RankFacts, *, cpu: bool, claims: Mapping[str, str]) -> RankInfo:
    """Returns what a rank says of itself; JSON.

    Args:
        facts: this rank's facts, as its launcher stated them.
        cpu: whether it computes on the CPU.
        claims: more that must be the same on all ranks: value by name.
    """
    same = {
        _JOB: os.environ.get(NONCE) or os.environ.get("TORCHELASTIC_RUN_ID", ""),
        _SIZE: str(facts.size),
        _VERSION: __version__,
        _CODE: code_hash(),
        _TORCH: str(torch.__version__),
        _DEVICE: "cpu" if cpu else str(torch.accelerator.current_accelerator()),
    }
    device = None if cpu or facts.local_unknown else _device_name(facts.local_rank)
    return {
        "rank": facts.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": device,
        "same": same | dict(claims),
    }


def _device_name(local_rank: int) -> str | None:
    """Names a GPU so that two ranks that share one can be told; None where it has no such name."""
    if not torch.cuda.is_available():
        return None
    # As Accelerate chooses it: with srun's --gpus-per-task each rank sees one GPU, its own.
    device = local_rank % torch.cuda.device_count()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def config_claims(values: Mapping[str, Any], recipe: Path | None) -> dict[str, str]:
    """Returns what a run's config claims, by dotted key; the recipe counts by its content, wherever its file lies.

    Args:
        values: the config, nested.
        recipe: the recipe's file, or None where it is a module.
    """
    claims = {f"config {key}": repr(value) for key, value in flatten(values).items()}
    if recipe is not None:
        claims["config recipe"] = recipe.name
        claims[f"{_CONTENT}{recipe.name}"] = file_hash(recipe)
    return claims


class SignedEntries:
    """Writes and reads what ranks say of themselves in rank 0's store.

    Args:
        mine: what this rank says; its names and values explain the others' digests.
        key: that of the job's ranks.
        scope: tells one start of the job from the next, so that no entry can be used twice.
    """

    def __init__(self, mine: RankInfo, key: bytes, scope: str) -> None:
        self._mine, self._key = mine, derive(key, "entries", scope)
        self._names = {self._digest(name): name for name in mine["same"]}
        self._values = {self._digest(name, value): value for name, value in mine["same"].items()}

    @property
    def folder(self) -> str:
        """Where in the store the entries are; who does not know the key cannot tell the name ahead."""
        return derive(self._key, "folder").hex()[:32]

    def text(self) -> str:
        """Returns this rank's entry."""
        same = dict(self._sent(name, value) for name, value in self._mine["same"].items())
        text = json.dumps({**self._mine, "same": same})
        return self._mac(text) + text

    def read(self, raw: bytes) -> RankInfo | None:
        """Returns what an entry says, in this rank's words where it knows them; None where it is none of this job's."""
        if len(raw) > _LONGEST:
            return None
        text = raw[_MAC_DIGITS:].decode(errors="replace")
        if not hmac.compare_digest(raw[:_MAC_DIGITS], self._mac(text).encode()):
            return None
        said = _checked(json.loads(text))
        if said is None:
            return None
        said["same"] = {self._names.get(name, name): self._values.get(v, v) for name, v in said["same"].items()}
        return said

    def signed(self, text: str) -> bytes:
        """Returns a text with a MAC by which ranks of the job know that rank 0 has written it."""
        return (self._mac(f"verdict {text}") + text).encode()

    def opened(self, raw: bytes) -> str | None:
        """Returns such a text; None where it is none of this job's."""
        text = raw[_MAC_DIGITS:].decode(errors="replace")
        known = hmac.compare_digest(raw[:_MAC_DIGITS], self._mac(f"verdict {text}").encode())
        return text if known else None

    def _sent(self, name: str, value: str) -> tuple[str, str]:
        if name in _OPEN:
            return name, value
        return self._digest(name), value if name.startswith(_CONTENT) else self._digest(name, value)

    def _mac(self, text: str) -> str:
        return hmac.digest(self._key, text.encode(errors="replace"), hashlib.sha256).hex()

    def _digest(self, *words: str) -> str:
        return f"digest:{derive(self._key, *words).hex()[:_DIGEST_DIGITS]}"


def _checked(said: Any) -> RankInfo | None:
    """Returns what an entry holds, None where it is not what ranks write: without a secret, anyone can make a MAC."""
    kinds = {"rank": int, "host": str, "pid": int, "device": (str, type(None)), "same": dict}
    if not isinstance(said, dict) or set(said) != set(kinds):
        return None
    if any(not isinstance(said[name], kind) for name, kind in kinds.items()) or type(said["rank"]) is not int:  # type: ignore[arg-type]
        return None
    return said if all(isinstance(value, str) for value in said["same"].values()) else None


def check_identities(said: Sequence[RankInfo]) -> None:
    """Compares what ranks said of themselves.

    Args:
        said: what came, in any order; ranks may be missing.

    Raises:
        WorldError: two differ, claim the same rank, or share a GPU; both are named, with the fix.
    """
    ordered = sorted(said, key=lambda one: one["rank"])
    names = list(dict.fromkeys(name for one in ordered for name in one["same"]))
    for name in names:
        _check_same(ordered, name)
    _check_distinct(ordered, lambda one: str(one["rank"]), "are both rank", "Give each node its own --node-rank.")
    _check_distinct(
        [one for one in ordered if one["device"]],
        lambda one: f"{one['device']} of {one['host']}",
        "compute on one GPU,",
        "Start one rank per GPU: set -n to their number, and CUDA_VISIBLE_DEVICES without duplicates.",
    )


def _check_same(said: Sequence[RankInfo], name: str) -> None:
    values = [one["same"].get(name, "nothing") for one in said]
    if len(set(values)) == 1:
        return
    shown = ", ".join(f"{_shown(value)} on {_ranks(said, name, value)}" for value in dict.fromkeys(values))
    remedy = _REMEDIES.get(name, "run the same command with the same files on every node")
    what = "a setting that this rank does not have" if name.startswith("digest:") else name
    raise _refusal(f"{what} is not the same on all ranks: {shown}. {remedy[0].upper()}{remedy[1:]}.")


def _shown(value: str) -> str:
    """Another rank's value is known by its digest alone."""
    return "another one" if value.startswith("digest:") else value


def _ranks(said: Sequence[RankInfo], name: str, value: str) -> str:
    having = [one for one in said if one["same"].get(name, "nothing") == value]
    hosts = ", ".join(dict.fromkeys(str(one["host"]) for one in having))
    return f"rank {', '.join(str(one['rank']) for one in having)} ({hosts})"


def _check_distinct(said: Sequence[RankInfo], key: Callable[[RankInfo], str], words: str, remedy: str) -> None:
    seen: dict[str, RankInfo] = {}
    for one in said:
        other = seen.setdefault(key(one), one)
        if other is not one:
            first, second = (f"rank {each['rank']} (process {each['pid']} on {each['host']})" for each in (other, one))
            raise _refusal(f"{first} and {second} {words} {key(one)}. {remedy}")


def place_on_host(said: Sequence[RankInfo]) -> dict[int, tuple[int, int]]:
    """Returns each rank's place among the ranks of its host: rank -> local rank, and how many there are."""
    by_host: dict[str, list[int]] = {}
    for rank, host in sorted((one["rank"], one["host"]) for one in said):
        by_host.setdefault(host, []).append(rank)
    return {rank: (place, len(ranks)) for ranks in by_host.values() for place, rank in enumerate(ranks)}


def _refusal(text: str) -> WorldError:
    return WorldError(text, on_all_ranks=True)
