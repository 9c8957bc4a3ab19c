"""What each rank says of itself before the first step, and what must be the same on all of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain import __version__
from dtrain.config.flat import flatten
from dtrain.errors import WorldError
from dtrain.launch.facts import RankFacts
from dtrain.launch.fingerprint import code_hash, file_hash
from dtrain.launch.slurm_step import NONCE

Said = dict[str, Any]

_JOB = "the job"
_REMEDIES = {
    _JOB: "another job uses this address: end it, or give this one another port or --job-id",
    "the number of ranks": "start every node with the same number of nodes and ranks",
    "dtrain's version": "install the same dtrain on every node",
    "dtrain's code": "install the same dtrain on every node",
    "torch's version": "install the same torch on every node",
    "the kind of device": "give all ranks the same, or add --cpu on every node",
}


def introduce(facts: RankFacts, *, cpu: bool, claims: Mapping[str, str]) -> Said:
    """Returns what a rank says of itself; JSON.

    Args:
        facts: this rank's facts, as its launcher stated them.
        cpu: whether it computes on the CPU.
        claims: more that must be the same on all ranks: value by name.
    """
    same = {
        _JOB: os.environ.get(NONCE) or os.environ.get("TORCHELASTIC_RUN_ID", ""),
        "the number of ranks": str(facts.size),
        "dtrain's version": __version__,
        "dtrain's code": code_hash(),
        "torch's version": str(torch.__version__),
        "the kind of device": "cpu" if cpu else str(torch.accelerator.current_accelerator()),
    }
    device = None if cpu else _device_name(facts.local_rank)
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
        claims[f"the content of {recipe.name}"] = file_hash(recipe)
    return claims


def check_identities(said: Sequence[Said]) -> None:
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
    _check_distinct(ordered, lambda one: str(one["rank"]), "are both rank", "Give each node a --node-rank of its own.")
    _check_distinct(
        [one for one in ordered if one["device"]],
        lambda one: f"{one['device']} of {one['host']}",
        "compute on one GPU,",
        "Start one rank for each GPU: -n with their number, and CUDA_VISIBLE_DEVICES without repetition.",
    )


def _check_same(said: Sequence[Said], name: str) -> None:
    values = [one["same"].get(name, "nothing") for one in said]
    if len(set(values)) == 1:
        return
    told = ", ".join(f"{value} on {_ranks(said, name, value)}" for value in dict.fromkeys(values))
    remedy = _REMEDIES.get(name, "run the same command with the same files on every node")
    raise _refusal(f"{name} is not the same on all ranks: {told}. {remedy[0].upper()}{remedy[1:]}.")


def _ranks(said: Sequence[Said], name: str, value: str) -> str:
    having = [one for one in said if one["same"].get(name, "nothing") == value]
    hosts = ", ".join(dict.fromkeys(str(one["host"]) for one in having))
    return f"rank {', '.join(str(one['rank']) for one in having)} ({hosts})"


def _check_distinct(said: Sequence[Said], key: Callable[[Said], str], words: str, remedy: str) -> None:
    seen: dict[str, Said] = {}
    for one in said:
        other = seen.setdefault(key(one), one)
        if other is not one:
            first, second = (f"rank {each['rank']} (process {each['pid']} on {each['host']})" for each in (other, one))
            raise _refusal(f"{first} and {second} {words} {key(one)}. {remedy}")


def _refusal(text: str) -> WorldError:
    error = WorldError(text)
    error.agreed = True
    return error
