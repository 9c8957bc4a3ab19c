"""A SLURM of virtual nodes, as tests use it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.cluster import services
from helpers.cluster.jobs import Job, read_job
from helpers.cluster.machines import Machine, boot_login, boot_node, network, unplug
from helpers.cluster.settings import Plan
from helpers.commands import BIN, Done, clean_environment
from helpers.running import wait_for

_FOREIGN = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SCANCEL", "SQUEUE", "SINFO", "SACCT")
_LONGEST_FOLDER = 50  # the path of a Unix socket in a folder below has 107 bytes at most


@dataclass
class Cluster:
    """A cluster that is up. All machines see this one's files.

    Attributes:
        plan: what it is like.
        base: the folder of its files.
        login: the login node.
        nodes: the nodes that are on, by name.
    """

    plan: Plan
    base: Path
    login: Machine
    nodes: dict[str, Machine] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """That of a user on the login node: SLURM is known, and nothing of a job that the tests themselves may be in."""
        kept = {name: value for name, value in clean_environment().items() if not name.startswith(_FOREIGN)}
        return {**kept, "SLURM_CONF": f"{self.base}/etc/slurm.conf", **more}

    def start(self, *argv: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
        """Starts a command on the login node; the process is the command itself, for the caller to end."""
        return subprocess.Popen(
            self.login.entered(*map(str, argv), processes=False, cwd=cwd),
            cwd=cwd,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *argv: object, cwd: Path, timeout: float = 120, **env: str) -> Done:
        """Runs a command on the login node."""
        return self._run(self.login.entered(*map(str, argv), processes=False, cwd=cwd), cwd, timeout, env)

    def dtrain(self, *words: object, cwd: Path, timeout: float = 120, **env: str) -> Done:
        """Runs `dtrain WORDS` on the login node."""
        return self.run(BIN / "dtrain", *words, cwd=cwd, timeout=timeout, **env)

    def on(self, name: str, *argv: object, cwd: Path, timeout: float = 120) -> Done:
        """Runs a command on a node, outside of any job."""
        return self._run(self.nodes[name].entered(*map(str, argv), processes=True, cwd=cwd), cwd, timeout, {})

    def _run(self, argv: list[str], cwd: Path, timeout: float, env: dict[str, str]) -> Done:
        done = subprocess.run(
            argv,
            check=False,
            cwd=cwd,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def told(self, *argv: object, cwd: Path | None = None) -> str:
        """What one of SLURM's commands prints; it has to succeed."""
        done = self.run(*argv, cwd=cwd or self.base)
        assert done.code == 0, f"{argv}: {done.text}\n{services.tails(self.base)}"
        return done.out

    def sbatch(self, *words: object, cwd: Path, **env: str) -> str:
        """Submits a job, and returns its id."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **env)
        assert done.code == 0, done.text
        return done.out.strip().partition(";")[0]

    def job(self, job: str) -> Job:
        """What SLURM says of a job; of an array's, of the task that comes first."""
        return read_job(job, self.told("scontrol", "--oneliner", "show", "job", job))

    def queue(self) -> dict[str, str]:
        """The state of each job that is not over, by id; those of an array that wait are one."""
        lines = self.told("squeue", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait(self, job: str, *states: str, seconds: float = 150, restarts: int = 0) -> Job:
        """Waits until a job is in one of some states, and was requeued so often; fails as soon as that cannot come.

        Args:
            job: its id.
            states: those waited for.
            seconds: the bound.
            restarts: how often it must have been requeued before.
        """
        deadline = time.monotonic() + seconds
        while True:
            now = self.job(job)
            if now.state in states and now.restarts >= restarts:
                return now
            late = time.monotonic() > deadline
            assert not late and not now.over, self.account(now, f"{'/'.join(states)}, waited for up to {seconds:g} s")
            time.sleep(0.1)

    def account(self, job: Job, wanted: str) -> str:
        """Why a job may not be where it should be."""
        said = f"job {job.id} is {job.state} ({job.reason}, restarts {job.restarts}), not {wanted}"
        return f"{said}\n--- {job.output}\n{job.text}\n{services.tails(self.base)}"

    def node_states(self) -> dict[str, str]:
        """The state of each node."""
        lines = self.told("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until_idle(self, seconds: float = 150) -> None:
        """Waits until nothing runs and all nodes that are on can be had."""

        def idle() -> bool:
            states = self.node_states()
            return not self.queue() and all(states.get(name) == "idle" for name in self.nodes)

        wait_for(idle, f"all nodes to be idle: {self.node_states()}\n{services.tails(self.base)}", seconds)

    def power_on(self, name: str) -> None:
        """Boots a node, and starts SLURM on it."""
        self.nodes[name] = boot_node(self.login, name, self.base)
        services.start_node(self.nodes[name], self.base)

    def power_off(self, name: str) -> None:
        """Ends a node at once, with all that runs there; SLURM has to find out."""
        self.nodes.pop(name).off()
        unplug(self.login, name)

    def cut(self, name: str) -> None:
        """Takes a node's network away; it runs on."""
        network(self.login, "link", "set", f"v-{name}", "down")

    def heal(self, name: str) -> None:
        """Gives it back."""
        network(self.login, "link", "set", f"v-{name}", "up")

    def clear(self) -> None:
        """Ends all jobs and brings all nodes back."""
        self.told("scancel", "--user", "root")  # who alone is here
        for name in self.plan.names():
            if name not in self.nodes:
                self.power_on(name)
            self.heal(name)
        self.wait_until_idle()

    def off(self) -> None:
        """Ends all machines at once."""
        self.login.off()  # in whose process space all nodes are
        for node in self.nodes.values():
            node.off()


@contextlib.contextmanager
def cluster(plan: Plan) -> Iterator[Cluster]:
    """Brings a cluster up, and takes it down at the end; several may be up at once.

    Each is in a network and a process space of its own, which end with the process that made them, however that ends.
    """
    short = len(tempfile.gettempdir()) < _LONGEST_FOLDER
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir=None if short else "/tmp"))  # noqa: S108
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, base)
        services.lay_out(plan, base)
        made = Cluster(plan, base, boot_login(base, services.daemons_environment(base)))
        undo.callback(made.off)
        try:
            _start(made)
        except BaseException:
            print(services.tails(base))
            raise
        yield made


def _start(made: Cluster) -> None:
    services.start_munge(made.login, made.base)
    if made.plan.accounting:
        services.start_accounting(made.login, made.base)
    services.start_controller(made.login)
    for name in made.plan.names():
        made.power_on(name)
    made.wait_until_idle()
