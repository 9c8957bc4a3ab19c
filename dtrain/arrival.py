"""The ranks arrive: each leaves a word at rank 0's store before any collective, so that who is missing can be named.

The process group itself would wait for half an hour and then name nobody.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dtrain.errors import WorldError
from dtrain.identity import Said, check_identities
from dtrain.launch.facts import RankFacts
from dtrain.launch.job import DEFAULT_TIMEOUT, TIMEOUT
from dtrain.launch.ports import words_of

_POLL_SECONDS = 0.02
_PROBE_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0  # torch's own limit comes first where it holds
_COUNT = "arrivals"


def time_limit() -> timedelta:
    """Returns how long ranks wait for one another before the first step.

    Raises:
        WorldError: DTRAIN_RDZV_TIMEOUT is no number of seconds.
    """
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        return timedelta(seconds=max(1.0, float(text)))
    except ValueError:
        raise WorldError(f"{TIMEOUT}={text!r} is no number of seconds.") from None


def arrive(facts: RankFacts, said: Said) -> Store:
    """Meets all ranks and compares what they say of themselves.

    Args:
        facts: this rank's facts.
        said: what it says of itself; see `identity.introduce`.

    Returns:
        the store; keep it until the process group is up, which uses the same server.

    Raises:
        WorldError: ranks did not come in time, or do not fit together; every rank that came raises it.
    """
    limit = time_limit()
    store = _open_store(facts, limit)
    attempt = PrefixStore(f"dtrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    number = attempt.add(_COUNT, 1)
    attempt.set(f"arrival/{number}", json.dumps(said))
    try:
        _wait_for_all(attempt, facts, limit)
    except WorldError:
        _let_others_read(attempt, facts)
        raise
    except dist.DistError as error:
        raise WorldError(f"rank 0 has gone while the ranks came together: {error}") from None
    return store


def _open_store(facts: RankFacts, limit: timedelta) -> TCPStore:
    """Opens the store that env:// will use: with several tenants in this process they share one server."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has a server of its own
    serves = facts.rank == 0 and not agents

    def make() -> TCPStore:
        return TCPStore(
            host, port, facts.size, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True
        )

    try:
        return make() if serves else _made_in_time(make, host, port, limit)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            from dtrain.launch.ports import holder_of

            raise WorldError(f"port {port} is in use{holder_of(port)}. Choose another one.") from None
        raise WorldError(
            f"rank {facts.rank} did not find rank 0 at {host}:{port} within {limit.total_seconds():g} s. See on the "
            f"first node whether it runs, and whether this address can be reached from here. ({_first_line(error)})"
        ) from None


def _made_in_time(make: Callable[[], TCPStore], host: str, port: int, limit: timedelta) -> TCPStore:
    """Makes a store's client; torch waits for ever for an answer of a program that is no store.

    Raises:
        WorldError: what listens there says something before it is asked, as no store does, or nothing in time.
    """
    made: queue.Queue[TCPStore | Exception] = queue.Queue()

    def try_it() -> None:
        try:
            made.put(make())
        except Exception as error:  # noqa: BLE001 - raised below
            made.put(error)

    threading.Thread(target=try_it, daemon=True).start()
    deadline = time.monotonic() + limit.total_seconds() + _PATIENCE_SECONDS
    while True:
        try:
            store = made.get(timeout=_PROBE_SECONDS)
        except queue.Empty:
            words = words_of(host, port)
            if words or (words is not None and time.monotonic() > deadline):
                does = f"answered {words!r}" if words else "says nothing"
                raise WorldError(
                    f"what listens at {host}:{port} is no dtrain rank: it {does}. "
                    "Another program uses this port: choose another one (MASTER_PORT), the same for all ranks."
                ) from None
            continue
        if isinstance(store, Exception):
            raise store
        return store


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _wait_for_all(store: Store, facts: RankFacts, limit: timedelta) -> None:
    deadline = time.monotonic() + limit.total_seconds()
    said: list[Said] = []
    while True:
        came = store.add(_COUNT, 0)
        while len(said) < came:
            said.append(json.loads(store.get(f"arrival/{len(said) + 1}")))
            check_identities(said)
        missing = sorted(set(range(facts.size)) - {one["rank"] for one in said})
        if not missing:
            return
        if time.monotonic() > deadline:
            raise _late(missing, facts, limit, said)
        time.sleep(_POLL_SECONDS)


def _late(missing: list[int], facts: RankFacts, limit: timedelta, said: list[Said]) -> WorldError:
    hosts = ", ".join(dict.fromkeys(str(one["host"]) for one in said))
    error = WorldError(
        f"rank {', '.join(map(str, missing))} of {facts.size} did not come within {limit.total_seconds():g} s; the "
        f"others are here ({hosts}). See why in their output, or allow more time: --rdzv-timeout, or {TIMEOUT}."
    )
    error.agreed = True
    return error


def _let_others_read(store: Store, facts: RankFacts) -> None:
    """Rank 0 has the store: it stays until the others that came have seen the same, for some seconds at most."""
    try:
        store.add("seen", 1)
        deadline = time.monotonic() + 5
        while facts.rank == 0 and store.add("seen", 0) < store.add(_COUNT, 0) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    except dist.DistError:  # it has gone; the reason is raised all the same
        pass
