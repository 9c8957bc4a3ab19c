"""A job as its launcher sees it: nodes, ranks, where they meet, and the variables that make a process a rank of it."""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.launch.env.inherited import GIVEN, MARK
from dtrain.launch.env.interfaces import GLOO, interface_to, interface_with
from dtrain.launch.env.slurm_env import NONCE
from dtrain.launch.env.threads import usable_cores
from dtrain.launch.monitor.exit_report import REPORT_DIR
from dtrain.launch.nodes.secret import KEY, Secret, ranks_key, without_secrets
from dtrain.launch.signals.lifeline import PARENT

TIMEOUT = "DTRAIN_RDZV_TIMEOUT"
HANG = "DTRAIN_HANG_SECONDS"
DEFAULT_TIMEOUT = 120.0
BY_ARRIVAL = -1
DEFAULT_STOP_SECONDS = 600.0


@dataclass(frozen=True)
class Job:
    """One node's part of a job.

    Attributes:
        ranks: ranks on each node.
        nodes: number of nodes.
        node_rank: which of them this is, from 0; `BY_ARRIVAL` before it is known, where nodes number themselves.
        host: the first node's name or address, where rank 0's store is.
        port: the port of that store; 0 before it is chosen.
        rdzv_port: the port where the nodes' launchers meet.
        timeout: seconds within which all nodes, then all ranks, must have come.
        nonce: tells this job from any other; made by the first node's launcher.
        environment: further variables for every rank.
        hang_seconds: how long a rank may stand still; 0 is for ever, and None where nobody said. See
            `dtrain.launch.monitor.hang_watch`.
        stop_seconds: how long ranks may take to stop on request; None where they do not know how to. See
            `dtrain.launch.signals.escalation`.
        log_dir: the folder of the ranks' logs; None for that of the run, if it has one.
        own_address: this node's, by which the other nodes' launchers and this one's are connected; empty before.
        retries: how often the job may be tried again, so that a launcher that comes while it runs, in a lost node's
            place, waits for the next attempt.
        secret: what all nodes' launchers know and nobody else; empty where nobody gave one.
    """

    ranks: int
    nodes: int = 1
    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    rdzv_port: int = 0
    timeout: float = DEFAULT_TIMEOUT
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    environment: dict[str, str] = field(default_factory=dict)
    hang_seconds: float | None = None
    stop_seconds: float | None = None
    log_dir: Path | None = None
    secret: Secret = field(default_factory=Secret)
    retries: int = 0
    own_address: str = ""

    @property
    def first_rank(self) -> int:
        """The global number of this node's first rank."""
        return self.node_rank * self.ranks

    def variables(self, local_rank: int) -> dict[str, str]:
        """Returns what makes a process a rank; it takes the place of a user's own values."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "WORLD_SIZE": str(self.nodes * self.ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "NODE_RANK": str(self.node_rank),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            NONCE: self.nonce,
            TIMEOUT: f"{self.timeout:g}",
        } | self.environment

    def defaults(self) -> dict[str, str]:
        """Returns what a rank gets where the user's environment says nothing."""
        values = {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.ranks))}
        # gloo would look the host's own name up, which fails or leads astray: on a laptop behind a VPN, and to
        # 127.0.1.1 on Debian, where no other node is. Of several nodes none is ever given the loopback interface.
        interface: str | None = "lo"
        if self.nodes > 1:
            interface = interface_with(self.own_address) if self.own_address else interface_to(self.host)
        if sys.platform == "linux" and interface is not None:
            values[GLOO] = interface
        return values

    def rank_environment(self, local_rank: int, reports: str) -> dict[str, str]:
        """Returns the whole environment of one rank.

        Args:
            local_rank: 0 to ranks - 1.
            reports: the folder for the ranks' reports.
        """
        said = "" if self.hang_seconds is None else str(self.hang_seconds)
        ours = {REPORT_DIR: reports, PARENT: str(os.getpid()), HANG: said, KEY: self.ranks_key().hex()}
        ours[GIVEN] = ",".join(name for name in self.environment if name.startswith("DTRAIN_"))
        theirs = {name: value for name, value in without_secrets(os.environ).items() if name != MARK}
        return self.defaults() | theirs | self.variables(local_rank) | ours

    def ranks_key(self) -> bytes:
        """Returns the key by which the job's ranks know each other: of one node's, nobody else can know the nonce."""
        return ranks_key(self.secret, self.nonce)
