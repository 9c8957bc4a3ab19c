"""All checks of this machine, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.tools.doctor import cluster, cores, folder, network
from dtrain.tools.doctor.finding import Finding, guarded
from dtrain.tools.doctor.gpus import check_gpus, default_ranks, find_gpus
from dtrain.tools.doctor.ranks import check_ranks
from dtrain.tools.doctor.versions import check_versions


@dataclass(frozen=True)
class DoctorRequest:
    """What shall be looked at.

    Attributes:
        ranks: how many start here; None for one a GPU, at least 2.
        cpu: whether they compute on the CPU.
        runs: the folder of all runs.
        wandb: whether the way to W&B is of interest.
    """

    ranks: int | None = None
    cpu: bool = False
    runs: Path = Path("runs")
    wandb: bool = False


def check_machine(request: DoctorRequest) -> Iterator[Finding]:
    """Yields each finding as it is made; the ranks, which take longest, come last."""
    gpus = find_gpus()
    cpu = request.cpu or gpus.visible < (request.ranks or 2)  # one GPU has no other one to reduce with
    ranks = request.ranks or (2 if cpu else default_ranks(gpus))
    gpu_too = cpu and gpus.visible > 0 and not request.cpu
    yield guarded("versions", check_versions)
    yield check_gpus(gpus)
    yield guarded(cores.CORES, lambda: cores.check_cores(ranks))
    yield guarded(cores.MEMORY, lambda: cores.check_memory(ranks))
    yield guarded(cores.SHARED, cores.check_shared_memory)
    yield guarded(cores.FILES, cores.check_open_files)
    yield guarded(cores.TEMPORARY, cores.check_temporary)
    yield guarded(network.PORTS, network.check_port)
    yield guarded(network.HOST_NAME, network.check_host_name)
    yield guarded(cluster.ENVIRONMENT, cluster.check_environment)
    yield from folder.check_folder(request.runs)
    yield cluster.check_job()
    yield from cluster.check_slurm()
    skipped = Finding(network.WANDB, "skip", "not checked: needs --wandb, or a config with track.wandb.project")
    yield network.check_wandb() if request.wandb else skipped
    yield from check_ranks(ranks, gpus, cpu=cpu, gpu_too=gpu_too)
