"""Rank 0's store, where ranks find each other: PyTorch's TCPStore, which asks nobody who they are.

Ranks of one machine share one that listens on their address alone. On several machines it listens on 127.0.0.1, and
the others' ranks reach it through the job's handshake (`dtrain.launch.nodes.tunnel`). torchrun has a store of its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from dtrain.errors import WorldError
from dtrain.launch.env.ports import PortBusyError, bound_to, holder_of, is_literal, listen_at, words_of
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.nodes.secret import RanksKey, derive
from dtrain.launch.nodes.tunnel import Entrance, Exit

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0  # torch's own limit comes first where it holds
_LOOPBACK = "127.0.0.1"
_ways: list[Entrance | Exit] = []  # this process's, for as long as it runs
_Way = TypeVar("_Way", Entrance, Exit)


@dataclass(frozen=True)
class OpenStore:
    """The store.

    Attributes:
        store: it.
        for_group: the store for the process group; None where that finds it by MASTER_ADDR and MASTER_PORT.
    """

    store: TCPStore
    for_group: Store | None = None


def open_store(facts: RankFacts, limit: timedelta, key: RanksKey) -> OpenStore:
    """Opens the store.

    Args:
        facts: this rank's facts.
        limit: how long rank 0 may take to come.
        key: that of the job's ranks.

    Raises:
        WorldError: there is none at MASTER_ADDR and MASTER_PORT in time, or something else.
    """
    host, port = place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has a server of its own
    # With a key that everybody can make, the tunnel would hold nobody off.
    several = facts.local_size < facts.size and not agents and key.private
    entrance: Entrance | None = None
    try:
        if facts.rank == 0 and not agents:
            store = _behind_exit(facts, place, limit, key.value) if several else _at(place, facts, limit)
        elif several:
            entrance = _kept(Entrance(place, _key(key.value), limit.total_seconds()))
            store = _in_time(partial(_client, facts, limit, (_LOOPBACK, entrance.port)), place, limit, entrance)
        else:
            store = _in_time(partial(_client, facts, limit, place), place, limit)
    except (dist.DistError, PortBusyError) as error:
        if isinstance(error, PortBusyError) or "EADDRINUSE" in str(error):
            raise WorldError(f"port {port} is in use{holder_of(port)}. Choose another one.") from None
        why = (entrance.trouble if entrance else "") or str(error).strip().partition("\n")[0]
        raise WorldError(
            f"rank {facts.rank} did not find rank 0 at {host}:{port} within {limit.total_seconds():g} s. Check on "
            f"the first node that it runs, and that this address can be reached from here. ({why})"
        ) from None
    return OpenStore(store, store if several else None)


def _at(place: tuple[str, int], facts: RankFacts, limit: timedelta) -> TCPStore:
    """Serves at the one address that ranks use; a name may mean another one to those of other machines."""
    one_address = facts.local_size == facts.size or is_literal(place[0])
    return _server(facts, place, limit, bound_to(*place) if one_address else None)


def _behind_exit(facts: RankFacts, place: tuple[str, int], limit: timedelta, key: bytes) -> TCPStore:
    """Serves ranks of other machines: at MASTER_PORT is the way out of the tunnel, and the store is behind it."""
    outside = listen_at(*place)
    inside = socket.create_server((_LOOPBACK, 0))
    address = _LOOPBACK, int(inside.getsockname()[1])
    store = _server(facts, address, limit, inside)
    _kept(Exit(outside, _key(key), address))
    return store


def _server(facts: RankFacts, place: tuple[str, int], limit: timedelta, listener: socket.socket | None) -> TCPStore:
    """Serves on a socket, which torch closes with the store; torch's own would listen on all addresses of the machine.

    Without one, where the address is not this machine's own, it is left to torch. The process group finds the server
    by its port: with several tenants they share it.
    """
    make = partial(
        TCPStore, *place, facts.size, is_master=True, timeout=limit, wait_for_workers=False, multi_tenant=True
    )
    if listener is None:
        return make()
    try:
        store = make(master_listen_fd=listener.fileno())
    except TypeError:
        listener.close()
        logger.warning(
            "torch %s takes no socket for its store, which listens on all addresses of this machine instead of %s: "
            "whoever reaches port %d can read and change it. Use a torch of the range that dtrain was tested with.",
            *(torch.__version__, *place),
        )
        return make()
    listener.detach()  # it is torch's now
    return store


def _client(facts: RankFacts, limit: timedelta, place: tuple[str, int]) -> TCPStore:
    return TCPStore(*place, facts.size, is_master=False, timeout=limit, wait_for_workers=False, multi_tenant=True)


def _key(ranks: bytes) -> bytes:
    return derive(ranks, "store")


def _kept(way: _Way) -> _Way:
    """Keeps a way to the store open; an earlier one of this process belongs to a world that has ended."""
    _close(os.getpid())
    _ways.append(way)
    atexit.register(_close, os.getpid())  # threads that live on would be cut off anywhere
    return way


def _close(owner: int) -> None:
    """Closes this process's; what a fork has of them belongs to the process that made them."""
    while _ways and os.getpid() == owner:
        _ways.pop().close()


def _in_time(
    make: Callable[[], TCPStore], place: tuple[str, int], limit: timedelta, entrance: Entrance | None = None
) -> TCPStore:
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
            words = words_of(*place)
            if words or (words is not None and time.monotonic() > deadline):
                does = f"answered {words!r}" if words else "says nothing"
                does = f"{does} ({entrance.trouble})" if entrance and entrance.trouble else does
                raise WorldError(
                    f"what listens at {place[0]}:{place[1]} is not a dtrain rank: it {does}. "
                    "Another program uses this port: choose another one (MASTER_PORT), the same for all ranks."
                ) from None
            continue
        if isinstance(store, Exception):
            raise store
        return store
