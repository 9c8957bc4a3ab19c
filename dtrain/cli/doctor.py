"""`dtrain doctor`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.ranks import on_ranks
from dtrain.cli.train import METAVAR, read_target

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.tools.doctor.local import DoctorRequest
    from dtrain.tools.doctor.nodes.job import DoctorJob

_OF_SBATCH = "With --nodes"


def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar=METAVAR, help="Config whose run.dir and track.wandb to check.", show_default=False),
    ] = None,
    *,
    ranks: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--ranks",
            min=1,
            help="Ranks on this machine (default: one per GPU, or 2); with --nodes, ranks "
            "per node (default: one per GPU, or 1).",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also check that W&B is reachable.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", "-N", min=1, help="Check this many nodes of a SLURM cluster, in a job.", show_default=False
        ),
    ] = None,
    time: Annotated[str, typer.Option("--time", help="Time limit of the job.", rich_help_panel=_OF_SBATCH)] = "10",
    partition: Annotated[
        str | None, typer.Option("--partition", "-p", help="Partition.", rich_help_panel=_OF_SBATCH)
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", "-A", help="Account to charge.", rich_help_panel=_OF_SBATCH)
    ] = None,
    qos: Annotated[
        str | None, typer.Option("--qos", "-q", help="Quality of service (QOS).", rich_help_panel=_OF_SBATCH)
    ] = None,
    gpus_per_node: Annotated[
        str | None, typer.Option("--gpus-per-node", help="GPUs per node.", rich_help_panel=_OF_SBATCH)
    ] = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option("--cpus-per-task", min=1, help="CPUs per node, for all its ranks.", rich_help_panel=_OF_SBATCH),
    ] = None,
    sbatch_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch-arg",
            metavar="--NAME=VALUE",
            help="Extra sbatch option; repeatable.",
            rich_help_panel=_OF_SBATCH,
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", min=1, help="Seconds to wait in the queue before giving up.", rich_help_panel=_OF_SBATCH
        ),
    ] = 600.0,
    into: Annotated[Path | None, typer.Option("--into", hidden=True)] = None,
) -> None:
    """Check this machine, or several nodes of a cluster, and suggest remedies for what is wrong.

    Each check passes, warns or fails, and prints what was measured and a remedy.
    Exit code 1 if a check failed.

    Examples: dtrain doctor; dtrain doctor --nodes 2 -n 8 --gpus-per-node 8 --partition gpu
    """
    with reported():
        from dtrain.tools.doctor.finding import exit_code

        request = _request(words or [], ranks, cpu, wandb)
        if nodes is None:
            found, rows = _here(request), []
        else:
            from dtrain.tools.doctor.nodes.job import checked_options

            named = {
                "time": time,
                "partition": partition,
                "account": account,
                "qos": qos,
                "gpus-per-node": gpus_per_node,
                "cpus-per-task": cpus_per_task or ranks,
            }
            options = [f"--{name}={value}" for name, value in named.items() if value is not None]
            order = _order(nodes, request, [*options, *checked_options(sbatch_arg or [])], wait)
            found, rows = _of_nodes(request, order, into)
        with piped():
            _show(found, rows, as_json=as_json)
        code = exit_code(found)
    raise typer.Exit(code)


def _request(words: list[str], ranks: int | None, cpu: bool, wandb: bool) -> DoctorRequest:
    from dtrain.tools.doctor.local import DoctorRequest

    config = read_target(words).config
    tracked = config.track.wandb is not None and config.track.wandb.mode == "online"
    return DoctorRequest(ranks, cpu, Path(config.run.dir), wandb or tracked)


def _order(nodes: int, request: DoctorRequest, options: list[str], wait: float) -> DoctorJob:
    from dtrain.tools.doctor.nodes.job import DoctorJob

    words = [*(["-n", str(request.ranks)] if request.ranks else []), *["--cpu"] * request.cpu]
    return DoctorJob(nodes, [*words, *["--wandb"] * request.wandb], options, wait)


def _here(request: DoctorRequest) -> Any:
    from dtrain.tools.doctor.local import check_machine

    with _busy("checking this machine ..."):
        return list(check_machine(request))


def _of_nodes(request: DoctorRequest, order: DoctorJob, into: Path | None) -> Any:
    from dtrain.tools.doctor.nodes.whole import check_nodes

    return check_nodes(request, order, into, lambda text: typer.echo(text, err=True))


def _show(found: list[Any], rows: list[list[str]], *, as_json: bool) -> None:
    from dtrain.tools.doctor.report import json_text, show

    if as_json:
        nodes = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        typer.echo(json_text(found, **({"nodes": nodes} if nodes else {})))
    else:
        show(found, rows)


@contextlib.contextmanager
def _busy(text: str) -> Iterator[None]:
    """Shows on a terminal that something goes on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(text):  # not whatever sys.stderr is for a moment
        yield


def doctor_rank(
    out: Annotated[Path, typer.Option()] = Path(),
    cpu: Annotated[bool, typer.Option()] = False,
    gpu_too: Annotated[bool, typer.Option()] = False,
) -> None:
    """Measure as one rank, for `doctor`."""

    def work(world: World) -> None:
        from dtrain.tools.doctor.collectives import measure

        measured = measure(world, gpu_too=gpu_too)
        if world.is_main:
            out.write_text(json.dumps(measured), encoding="utf-8")

    with reported():
        on_ranks(None, cpu, work)


def doctor_node(
    meet: Annotated[list[str], typer.Option()],
    folder: Annotated[Path, typer.Option()] = Path(),
) -> None:
    """Do one node's part, for `doctor --nodes`."""
    with reported():
        from dtrain.launch.nodes.secret import Secret
        from dtrain.tools.doctor.nodes.task import serve_node

        code = serve_node(meet, Secret(sys.stdin.readline().strip().encode(), "the host"), folder)
    raise typer.Exit(code)
