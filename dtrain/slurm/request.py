"""What is asked of SLURM for a run, as typed options; checked before anything is submitted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UsageError

DEFAULT_STOP_BEFORE = 120
DEFAULT_REQUEUES = 3
_LONGEST_STOP_BEFORE = 65535  # what sbatch's --signal takes
_EARLY = 60  # seconds; SLURM looks so often who is to get a signal
_GPUS = re.compile(r"(?:[A-Za-z0-9._-]+:)?([1-9][0-9]*)")
_MEM = re.compile(r"[0-9]+(?:[KMGT]B?)?", re.IGNORECASE)
_LONG_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(?:=.*)?", re.DOTALL)

# What the script says itself, and how it is said to dtrain; None where a run could not work with anything else.
_TAKEN = {
    "account": "--account",
    "array": "--array",
    "chdir": None,
    "constraint": "--constraint",
    "cpus-per-task": "--cpus-per-task",
    "error": None,
    "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "job-name": "--job-name",
    "mem": "--mem",
    "no-requeue": "--requeues 0",
    "nodes": "--nodes",
    "ntasks": "-n",
    "ntasks-per-node": "-n",
    "open-mode": None,
    "output": None,
    "parsable": None,
    "partition": "--partition",
    "qos": "--qos",
    "requeue": "--requeues",
    "signal": "--stop-before",
    "test-only": "--dry-run",
    "time": "--time",
    "wait": None,
    "wrap": None,
}


@dataclass(frozen=True)
class JobRequest:
    """What a job needs, and how its ranks are started.

    Attributes:
        job_name: the job's name in the queue.
        nodes: number of nodes.
        ranks: ranks on each node; None for one for each GPU, or one.
        gpus_per_node: "8" or "a100:8"; None for no GPUs.
        cpu: whether the ranks compute on the CPU.
        per_rank: whether each rank is a task of SLURM's, instead of one launcher on each node.
        time: the time limit as sbatch takes it; None for the partition's own.
        partition: where it may run, or None for the cluster's default.
        account: what it is charged to.
        qos: the quality of service.
        constraint: features that nodes must have.
        cpus_per_task: CPUs of each task: of a launcher, and so of all its ranks, or of a rank with `per_rank`.
        mem: memory of each node, as in 64G; 0 is all of it.
        env_setup: a shell file that readies the environment, on the first node.
        container: words that are put before the ranks' command.
        sbatch_args: further options of sbatch, each a whole --name=value.
        srun_args: further options of srun, each a word.
        stop_before: seconds before the time limit at which the run is asked to save and stop.
        requeues: max requeues without progress.
        retries: so many failures without progress are tried again within the job.
        tasks: number of an array's runs; None for a single run.
        at_once: so many of an array's runs may run at the same time; None for any number.
    """

    job_name: str
    nodes: int = 1
    ranks: int | None = None
    gpus_per_node: str | None = None
    cpu: bool = False
    per_rank: bool = False
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    env_setup: Path | None = None
    container: tuple[str, ...] = ()
    sbatch_args: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    stop_before: int = DEFAULT_STOP_BEFORE
    requeues: int = DEFAULT_REQUEUES
    retries: int = 0
    tasks: int | None = None
    at_once: int | None = None

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: as asked, else one for each GPU, else one."""
        return self.ranks or self.gpu_count or 1

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def gpu_count(self) -> int:
        """GPUs of each node that are asked for."""
        found = _GPUS.fullmatch(self.gpus_per_node or "")
        return int(found[1]) if found else 0

    @property
    def task_cpus(self) -> int:
        """CPUs of each task: as asked, else one for each of its ranks, where SLURM's own default is one in all."""
        return self.cpus_per_task or (1 if self.per_rank else self.ranks_per_node)

    def remarks(self) -> list[str]:
        """Returns what is allowed and may still not be what is wanted; of a checked request."""
        limit = None if self.time is None else seconds_of(self.time)
        left = None if limit is None else limit - self.stop_before - _EARLY
        if left is None or left >= _EARLY:
            return []
        return [
            f"--time {self.time} with --stop-before {self.stop_before}: SLURM may send the signal up to {_EARLY} s "
            f"early, which leaves {max(0, left)} s per start, including loading"
        ]

    def check(self) -> None:
        """Looks at every value.

        Raises:
            UsageError: some are wrong; each is named, with what it should be.
        """
        found = [
            *_numbers(self),
            *_texts(self),
            *_time(self),
            *_gpus(self),
            *_together(self),
            *_setup(self.env_setup),
            *(problem for word in self.sbatch_args for problem in _sbatch_arg(word)),
            *(problem for word in self.srun_args for problem in _srun_arg(word)),
        ]
        if found:
            raise UsageError("\n".join(found))


def seconds_of(time: str) -> int | None:
    """Returns a time limit in seconds; None for none.

    Args:
        time: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, or UNLIMITED.

    Raises:
        ValueError: it is none of these.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if re.fullmatch(r"[0-9]+(-[0-9]+(:[0-9]+){0,2}|(:[0-9]+){0,2})", time, re.ASCII) is None:
        raise ValueError(time)
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _numbers(request: JobRequest) -> list[str]:
    least = {
        "--nodes": (request.nodes, 1),
        "-n": (request.ranks, 1),
        "--cpus-per-task": (request.cpus_per_task, 1),
        "--stop-before": (request.stop_before, 1),
        "--requeues": (request.requeues, 0),
        "--retries": (request.retries, 0),
        "--at-once": (request.at_once, 1),
    }
    found = [
        f"{option} {value}: should be a whole number of at least {low}."
        for option, (value, low) in least.items()
        if value is not None and value < low
    ]
    if request.stop_before > _LONGEST_STOP_BEFORE:
        found.append(f"--stop-before {request.stop_before}: should be at most {_LONGEST_STOP_BEFORE} seconds.")
    return found


def _texts(request: JobRequest) -> list[str]:
    texts = {
        "--job-name": request.job_name,
        "--partition": request.partition,
        "--account": request.account,
        "--qos": request.qos,
        "--constraint": request.constraint,
    }
    found = [problem for option, text in texts.items() if text is not None for problem in _line(option, text)]
    if request.mem is not None and not _MEM.fullmatch(request.mem):
        found.append(
            f"--mem {request.mem!r}: should be a number with K, M, G or T, such as 64G; 0 means all memory of a node."
        )
    return found


def _line(option: str, text: str) -> list[str]:
    """SLURM would read a line break in one of its lines as the beginning of the next."""
    if not text.strip():
        return [f"{option} {text!r}: should not be empty."]
    if not text.isprintable():
        return [f"{option} {text!r}: should be text without line breaks and control characters."]
    return []


def _time(request: JobRequest) -> list[str]:
    if request.time is None:
        return []
    try:
        seconds = seconds_of(request.time)
    except ValueError:
        return [
            f"--time {request.time!r}: should be minutes, MM:SS, HH:MM:SS, D-HH, "
            "D-HH:MM or D-HH:MM:SS, such as 4:00:00; "
            "or UNLIMITED."
        ]
    if seconds == 0:
        return [f"--time {request.time!r}: should be more than 0; UNLIMITED means no limit."]
    if seconds is not None and request.stop_before >= seconds:
        return [
            f"--stop-before {request.stop_before}: should be less than --time {request.time}, which is {seconds} "
            "seconds: the run is asked to save that long before the limit."
        ]
    return []


def _gpus(request: JobRequest) -> list[str]:
    if request.gpus_per_node is None:
        return []
    if not request.gpu_count:
        return [
            f"--gpus-per-node {request.gpus_per_node!r}: should be a number, such as 8, or TYPE:NUMBER, such as a100:8."
        ]
    if request.cpu:
        return [f"--gpus-per-node {request.gpus_per_node} with --cpu: use only one of them; --cpu uses no GPUs."]
    if request.ranks_per_node > request.gpu_count:
        return [
            f"-n {request.ranks} with --gpus-per-node {request.gpus_per_node}: should be at most {request.gpu_count}, "
            "since each rank uses its own GPU."
        ]
    return []


def _together(request: JobRequest) -> list[str]:
    found = []
    if request.at_once is not None and request.tasks is None:
        found.append(f"--at-once {request.at_once}: needs --array, whose runs it limits.")
    if request.per_rank and request.retries:
        found.append(
            f"--retries {request.retries} with --per-rank: use only one of them; retries within the job need the "
            "launcher, which --per-rank omits."
        )
    return found


def _setup(file: Path | None) -> list[str]:
    if file is None:
        return []
    return [] if file.is_file() else [f"--env-setup {str(file)!r}: should be a shell file; no such file."]


def _sbatch_arg(word: str) -> list[str]:
    option = f"--sbatch-arg {word!r}"
    match = _LONG_OPTION.fullmatch(word)
    if match is None:
        return [f"{option}: should be a long sbatch option with its value: --sbatch-arg=--exclude=node7."]
    if not word.isprintable():
        return [f"{option}: should be text without line breaks and control characters."]
    # sbatch takes shortened names, too.
    taken = next(
        (name for name in _TAKEN if name == match[1] or (len(match[1]) > 2 and name.startswith(match[1]))), None
    )
    if taken is None:
        return []
    own = _TAKEN[taken]
    return [f"{option}: use the dtrain option {own}." if own else f"{option}: the script sets --{taken} itself."]


def _srun_arg(word: str) -> list[str]:
    if word.startswith("-") and word.strip("-"):
        return []
    return [f"--srun-arg {word!r}: should be an srun option with its value: --srun-arg=--cpu-bind=none."]
