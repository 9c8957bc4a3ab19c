"""The faults of the sweep: what is done, what must be said, and how long the end may take.

Where dtrain's words or exit codes change, this is the place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from helpers.sweep import FULL

from dtrain.errors import EXIT_STOPPED

STEPS, BATCH, EPOCHS = 4, 4, 2  # of the recipe, on each rank
HANG_SECONDS = 2
# Seconds to the end. A full sweep has the machine to itself; else other tests may run beside it.
SUDDEN, HANGING, LAUNCHER, NODES = (seconds * (1 if FULL else 3) for seconds in (10.0, 15.0, 5.0, 15.0))
MEETING = 30.0  # from the start of the processes, whose imports take their time on a busy machine

PLACE = r"rank {rank}, epoch {epoch}, {phase} step {step}"
NAMED = "(rank {rank}|the training process)"  # the latter where it is the only one
STUCK = rf"a hang was stopped: {NAMED} has been in epoch {{epoch}}, {{phase}} step {{step}} for \d+ s"
STOPPED = r"stopped on request \({signal}\), in epoch \d+"
LOST = r"node \d is lost"
DTRAIN, TORCHRUN, SRUN = "dtrain", "torchrun", "srun"  # who starts the ranks


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        how: which part of the sweep does it: "recipe", "launcher", "nodes", "spread" (the recipe on two nodes),
            "meeting", "healthy", or those that are healthy for all their surroundings: "output", "inherited".
        does: what the recipe does, or other ways to do it; one is drawn.
        phases: where; one is drawn.
        cause: in failure.json, None where there is none to be.
        code: exit code of the launcher.
        says: patterns that the screen must have.
        within: seconds from the fault to the end of the last process.
        more: further words of the command line.
        under: who may start the ranks.
        ranks: the least number of them.
    """

    how: str
    does: Sequence[str] = ("",)
    phases: Sequence[str] = ("train", "valid")
    cause: str | None = None
    code: int = 1
    says: Sequence[str] = ()
    within: float = SUDDEN
    more: Sequence[str] = ()
    under: Sequence[str] = (DTRAIN, TORCHRUN, SRUN)
    ranks: int = 1


def _nodes(how: str, does: str | Sequence[str], **more: object) -> Fault:
    """What needs dtrain's own launchers, and two of them."""
    return Fault(how, (does,) if isinstance(does, str) else does, under=(DTRAIN,), ranks=2, **more)  # type: ignore[arg-type]


def _hang(does: str, *phases: str, says: str = "") -> Fault:
    hang = (f"hang_seconds={HANG_SECONDS}",)
    return Fault(
        "recipe", (does,), phases, "hang", 76, tuple(filter(None, (STUCK, says))), HANGING + HANG_SECONDS, hang
    )


def _launcher(signal: str, code: int, *says: str) -> Fault:
    # One that stops on request finishes its step and saves a checkpoint first.
    within = SUDDEN if code == EXIT_STOPPED else LAUNCHER
    return Fault(
        "launcher",
        (signal,),
        code=code,
        says=[one.replace("{signal}", signal) for one in says],
        within=within,
    )


FAULTS = {
    "exception": Fault("recipe", ("raise", "shape"), cause="exception", says=("raised by your code", "at " + PLACE)),
    "SIGKILL": Fault("recipe", ("kill",), cause="killed", says=(NAMED + " was killed by SIGKILL", "at " + PLACE)),
    "os._exit(0)": Fault("recipe", ("exit",), cause="exit", says=(NAMED + " exited with code 0", "at " + PLACE)),
    "segfault": Fault(
        "recipe",
        ("segfault",),
        cause="segfault",
        says=("Fatal Python error: Segmentation fault", NAMED + " was killed by SIGSEGV", "at " + PLACE),
    ),
    "memory limit": Fault(
        "recipe",
        ("memory", "memory of torch", "memory of objects", "memory of text"),
        cause="out_of_memory",
        says=("raised by your code", "at " + PLACE),
    ),
    "sleep in train": _hang("sleep", "train", says="fall_silent"),
    "sleep in valid": _hang("sleep", "valid", says="fall_silent"),
    "sleep in a worker": _hang("worker", "train", says="__getitem__"),
    "SIGSTOP": _hang("stop", "train", "valid", says="is stopped"),
    "NaN": Fault(
        "recipe",
        ("nan",),
        ("train",),
        "nan",
        says=("the loss of this step is nan", "have the indices {indices} in the dataset", "at " + PLACE),
    ),
    "launcher SIGTERM": _launcher("SIGTERM", EXIT_STOPPED, STOPPED),
    "launcher SIGINT": _launcher("SIGINT", EXIT_STOPPED, STOPPED),
    "launcher SIGHUP": _launcher("SIGHUP", EXIT_STOPPED, STOPPED),
    "launcher SIGKILL": _launcher("SIGKILL", -9),
    "stdout gone": Fault("output", ("read on",), code=0, under=(DTRAIN,)),
    "reader dies at Ctrl-C": Fault("output", ("SIGINT",), code=EXIT_STOPPED, under=(DTRAIN,)),
    "long TMPDIR": Fault("healthy", ("go on",), ("train",), code=0, within=MEETING),
    "variables inherited": Fault("inherited", ("go on",), code=0, under=(DTRAIN,)),
    "network cut": _nodes("nodes", "cut", says=(LOST,), within=NODES),
    "node's launcher SIGKILL": _nodes("nodes", "SIGKILL", says=(LOST,), within=NODES),
    "exception, two nodes": _nodes(
        "spread", ("raise", "shape"), cause="exception", says=("raised by your code", "at " + PLACE), within=NODES
    ),
    "SIGKILL, two nodes": _nodes(
        "spread", "kill", cause="killed", says=("rank {rank} was killed by SIGKILL", "at " + PLACE), within=NODES
    ),
    "sleep, two nodes": _nodes(
        "spread", "sleep", cause="hang", code=76, says=(STUCK,), within=NODES, more=(f"hang_seconds={HANG_SECONDS}",)
    ),
    "foreign process on the port": _nodes(
        "meeting", "foreign", code=2, says=(r"not a dtrain (launcher|rank)", "220 a foreign service"), within=MEETING
    ),
    "another recipe on node 2": _nodes(
        "meeting",
        "recipe",
        code=2,
        says=(r"the content of mine.py is not the same on all nodes: \w{{12}} on node 0, \w{{12}} on node 1",),
        within=MEETING,
    ),
    "port in use": _nodes(
        "meeting", "port", code=2, within=MEETING, says=(r"port \d+ is in use by process {holder} \(",)
    ),
    "8 s checkpoint": Fault("healthy", ("write 8 s",), ("checkpoint",), code=0),
    "8 s validation batch": Fault("healthy", ("work 8 s",), ("valid",), code=0),
}


@dataclass(frozen=True)
class Case:
    """One fault at one place; the seed draws the place."""

    fault: str
    ranks: int
    load: str
    seed: int
    under: str = DTRAIN
    place: dict[str, object] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        fault, draw = FAULTS[self.fault], random.Random(f"{self.fault} {self.ranks} {self.seed}")
        drawn = {
            "does": draw.choice(fault.does),
            "phase": draw.choice(fault.phases),
            "rank": draw.randrange(self.ranks),
            "epoch": draw.randint(1, EPOCHS),
            "step": draw.randint(1, STEPS),
            "imperative": draw.random() < 0.5,
            "workers": draw.randint(0, 1),
            "node": draw.randrange(2),
        }
        if drawn["does"] == "worker":
            drawn |= {"workers": 1, "epoch": 1}
        if self.fault == "long TMPDIR":
            drawn |= {"workers": 1}  # whose sockets are there
        if drawn["phase"] == "checkpoint":
            drawn |= {"rank": 0, "step": 1}  # rank 0 writes, once an epoch
        object.__setattr__(self, "place", drawn)

    @property
    def kind(self) -> Fault:
        return FAULTS[self.fault]

    @property
    def possible(self) -> bool:
        """Whether this launcher starts so many ranks for this fault."""
        return self.under in self.kind.under and self.ranks >= self.kind.ranks

    @property
    def length(self) -> int:
        """Samples of either data set."""
        return STEPS * BATCH * self.ranks

    def first_sample(self) -> int:
        """The index of the first sample of the batch of the place."""
        return ((int(str(self.place["step"])) - 1) * self.ranks + int(str(self.place["rank"]))) * BATCH

    def words(self) -> list[str]:
        """What `dtrain train` is given for the place, besides the fault."""
        place = [f"model.{name}={self.place[name]}" for name in ("rank", "epoch", "step", "phase")]
        style = f"model.imperative={str(self.place['imperative']).lower()}"
        run = [f"epochs={EPOCHS}", "run.name=it", f"length={self.length}", f"workers={self.place['workers']}"]
        return [*place, style, *run, *self.kind.more]

    def again(self) -> str:
        """The words that run this case alone."""
        under = "" if self.under == DTRAIN else f" --under {self.under}"
        return f"--only '{self.fault}' --ranks {self.ranks} --load {self.load} --seed {self.seed}{under}"
