"""What SLURM's files say: pure functions of a plan and a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"  # each cluster has a network of its own, which nothing else sees
LOGIN = "login"
_LOGIN_ADDRESS = f"{NETWORK}.254"
_CTLD_PORT, _SLURMD_PORT, _DBD_PORT = 6817, 6818, 6819
NAME = "dtrain"


@dataclass(frozen=True)
class Plan:
    """What a cluster is like.

    Attributes:
        nodes: number of nodes: n1, n2 ...
        cpus: CPUs of each, as SLURM believes them to be.
        gpus: GPUs of each, which are no more than a number to SLURM.
        memory: MiB of each.
        accounting: whether sacct works.
        kill_wait: seconds between TERM and KILL.
        grace: seconds that a preempted job has.
        node_timeout: seconds after which a node that does not answer is lost.
        requeue_wait: seconds before a requeued job may start again; SLURM's default of 120 is too long for a test.
    """

    nodes: int = 4
    cpus: int = 4
    gpus: int = 2
    memory: int = 4000
    accounting: bool = False
    kill_wait: int = 20
    grace: int = 30
    node_timeout: int = 6
    requeue_wait: int = 6

    def names(self) -> list[str]:
        """The nodes' names."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def address(name: str) -> str:
    """The IP address of a node, or of the login node."""
    return _LOGIN_ADDRESS if name == LOGIN else f"{NETWORK}.{int(name[1:])}"


def slurm_conf(plan: Plan, base: Path) -> str:
    """Returns slurm.conf: any user's jobs, no cgroups, quick decisions."""
    everyone = f"n[1-{plan.nodes}]"
    pairs = {
        "ClusterName": NAME,
        "SlurmctldHost": f"{LOGIN}({_LOGIN_ADDRESS})",
        "SlurmctldPort": _CTLD_PORT,
        "SlurmdPort": _SLURMD_PORT,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits until its credential has run out.
        "AuthInfo": f"socket={base}/munge/socket,cred_expire={plan.requeue_wait}",
        "StateSaveLocation": f"{base}/state",
        "SlurmdSpoolDir": f"{base}/spool/%n",
        "SlurmctldPidFile": f"{base}/run/slurmctld.pid",
        "SlurmdPidFile": f"{base}/run/slurmd-%n.pid",
        "SlurmctldLogFile": f"{base}/log/slurmctld.log",
        "SlurmdLogFile": f"{base}/log/slurmd-%n.log",
        "SlurmctldDebug": "info",
        "SlurmdDebug": "verbose",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": 1,
        **_accounting(plan, base),
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",  # CPUs= below holds, not the real number
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "ReturnToService": 2,
        "SlurmctldTimeout": plan.node_timeout,
        "SlurmdTimeout": plan.node_timeout,
        "KillWait": plan.kill_wait,
        "OverTimeLimit": 0,
        "MinJobAge": 3600,  # what has ended can still be asked for
        "JobRequeue": 1,
        "GresTypes": "gpu",
    }
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={address(name)} CPUs={plan.cpus} RealMemory={plan.memory}"
        f" Gres=gpu:{plan.gpus} State=UNKNOWN"
        for name in plan.names()
    ]
    common = f"Nodes={everyone} MaxTime=UNLIMITED DefaultTime=30 State=UP OverSubscribe=NO"
    partitions = [
        f"PartitionName=main {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={plan.grace}",
        f"PartitionName=urgent {common} PriorityTier=9 PreemptMode=OFF",
    ]
    return "\n".join([*(f"{key}={value}" for key, value in pairs.items()), *nodes, *partitions, ""])


def _accounting(plan: Plan, base: Path) -> dict[str, object]:
    if not plan.accounting:
        return {"AccountingStorageType": "accounting_storage/none"}
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": LOGIN,
        "AccountingStoragePort": _DBD_PORT,
        "AccountingStoragePass": f"{base}/munge/socket",  # AuthInfo is not asked for this link
    }


def gres_conf(plan: Plan, base: Path) -> str:
    """Returns gres.conf; a GPU without a device file would be thrown away."""
    return f"NodeName=n[1-{plan.nodes}] Name=gpu File={base}/dev/gpu[0-{plan.gpus - 1}]\n"


def slurmdbd_conf(base: Path) -> str:
    """Returns slurmdbd.conf."""
    pairs = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={base}/munge/socket",
        "DbdHost": LOGIN,
        "DbdPort": _DBD_PORT,
        "SlurmUser": "root",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "StorageLoc": "slurm_acct",
        "LogFile": f"{base}/log/slurmdbd.log",
        "PidFile": f"{base}/run/slurmdbd.pid",
    }
    return "".join(f"{key}={value}\n" for key, value in pairs.items())


def hosts(plan: Plan) -> str:
    """Returns /etc/hosts of all machines.

    The second name of an address is for look-ups of v4-mapped ones, without which torch's store warns; it is a name of
    its own so that "n1" is an IPv4 address alone.
    """
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    for name in [LOGIN, *plan.names()]:
        lines += [f"{address(name)} {name}", f"::ffff:{address(name)} {name}-v4"]
    return "\n".join([*lines, ""])


def stepd_script(python: str, stepd: str) -> str:
    """Returns a program that becomes slurmstepd, as the one that orphans come back to.

    Without cgroups SLURM finds a step's processes by their parents alone, and would never end a rank whose launcher is
    gone, as it does on real clusters. 36 is PR_SET_CHILD_SUBREAPER, which is kept over exec.
    """
    return (
        f"#!{python} -SE\nimport ctypes, os, sys\n"
        f"ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\nos.execv({stepd!r}, sys.argv)\n"
    )
