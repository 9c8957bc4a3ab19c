"""Has this node's launcher meet those of the others, as the first node or as another one."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dtrain.launch.env.job import BY_ARRIVAL, Job
from dtrain.launch.env.ports import PortBusyError, is_own_address, listen_at
from dtrain.launch.nodes.base import Rendezvous, place_of
from dtrain.launch.nodes.first_node import FirstNode
from dtrain.launch.nodes.other_node import OtherNode
from dtrain.launch.nodes.secret import warning_short, warning_without
from dtrain.launch.terminal.guarded import say


def meet(job: Job, about: Mapping[str, str], stop: Sequence[int]) -> Rendezvous:
    """Meets the launchers of the other nodes.

    Args:
        job: this node's part.
        about: what must be the same on all nodes, by the names that a person knows it by.
        stop: gets the signals that come meanwhile.

    Returns:
        the meeting; its `job` knows the store's port and the nonce of the whole job.

    Raises:
        WorldError: a node is missing, differs, or what listens there is something else.
        Stopped: a signal came.
    """
    listener = _listener(job)
    if listener is not None:
        _warn(job)
        first = FirstNode(replace(job, node_rank=0), about, listener)
        try:
            first.gather(stop)
        except BaseException:
            first.close()
            raise
        return first
    other = OtherNode(job, about)
    try:
        other.join(stop)
    except BaseException:
        other.close()
        raise
    return other


def _warn(job: Job) -> None:
    """On the first node alone: one warning for all."""
    text = warning_short(job.secret) if job.secret.is_short else "" if job.secret else warning_without(place_of(job))
    if text:
        say(text)


def _listener(job: Job) -> socket.socket | None:
    """Returns where the first node waits for the others; None on any other node."""
    if job.node_rank == 0:
        return listen_at(job.host, job.rdzv_port)
    if job.node_rank != BY_ARRIVAL or not is_own_address(job.host):
        return None
    try:
        return listen_at(job.host, job.rdzv_port)
    except PortBusyError:  # by another launcher of this job on the same machine; if not, that will show
        return None
