"""What becomes of a job when its ranks have ended: a pure function of how they ended and of what was asked."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from dtrain.errors import EXIT_OK, EXIT_STOPPED
from dtrain.launch.monitor.exit_report import PEER
from dtrain.launch.monitor.postmortem import LOST

# Of ranks that stopped when they were asked to: or died of that, since it came before they could hear it.
STOPPED = (EXIT_STOPPED, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)

# What ranks, or a launcher, can say of another machine that is gone; and of a process there that is.
NODE_MAY_BE_LOST = (LOST, PEER)

END, REQUEUE, CANCEL, AWAIT = "end", "requeue", "cancel", "await"


@dataclass(frozen=True)
class AttemptEnd:
    """How one attempt of a job ended.

    Attributes:
        code: the exit code of its ranks, as srun passes it on.
        asked: whether the batch shell was asked to stop, and to have the job started again (SIGUSR1).
        terminated: whether SLURM was ending the job meanwhile (SIGTERM).
        preempted: whether it does so for another job's sake, with a time of grace: a job that ends within that would
            not be started again by SLURM.
        stop_file: whether the run's STOP file is there.
        cancel_file: whether `dtrain cancel` was asked for.
        failure: what the run's failure.json says of this attempt, None where there is none.
        nodes_answer: whether, after such a failure, something can be run on every node.
        without_progress: how many attempts, this one included, the run has stood still for.
        cap: so many of these are followed by another one.
    """

    code: int
    asked: bool = False
    terminated: bool = False
    preempted: bool = False
    stop_file: bool = False
    cancel_file: bool = False
    failure: dict[str, Any] | None = None
    nodes_answer: bool = False
    without_progress: int = 0
    cap: int = 3


@dataclass(frozen=True)
class NextAction:
    """What is to be done.

    Attributes:
        action: `END`; `REQUEUE`; `CANCEL`, of its own, so that SLURM tells it from a failure; `AWAIT`: SLURM will find
            that a node is lost and start the job again by itself, or, if it does not, the job asks for that.
        why: in words.
    """

    action: str
    why: str


def verdict(ended: AttemptEnd) -> NextAction:
    """Returns what is to be done with a job whose ranks have ended."""
    if ended.code == EXIT_OK:
        return NextAction(END, "complete")
    if ended.terminated and not ended.preempted:
        return NextAction(END, "terminated by SLURM, which requeues it after preemption or node failure")
    if ended.code in STOPPED:
        return _stopped(ended)
    cause = None if ended.failure is None else ended.failure["cause"]
    if cause in NODE_MAY_BE_LOST and not ended.nodes_answer:
        return _again(ended, AWAIT, "node failure")
    return NextAction(END, "failed" if cause is None else f"failed: {cause}")


def _stopped(ended: AttemptEnd) -> NextAction:
    if ended.stop_file:
        return NextAction(CANCEL, "stopped for good by the STOP file")
    if ended.cancel_file:
        return NextAction(CANCEL, "cancelled")
    if ended.preempted:
        return _again(ended, REQUEUE, "preempted")
    if ended.asked:
        return _again(ended, REQUEUE, "stopped before the time limit")
    return NextAction(END, "stopped on request")


def _again(ended: AttemptEnd, action: str, why: str) -> NextAction:
    if ended.without_progress > ended.cap:
        return NextAction(END, f"{why}; giving up: {given_up(ended.without_progress)}")
    return NextAction(action, why)


def given_up(without_progress: int) -> str:
    """Returns why a job is not started again."""
    return f"{without_progress} starts in a row without a new epoch or checkpoint"
