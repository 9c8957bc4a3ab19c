"""`dtrain launch`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.callbacks.progress.events import Events, emit_end
from dtrain.cli.console import asked_for_events
from dtrain.cli.guard import reported
from dtrain.cli.train import Retries, log_own_config, read_target
from dtrain.cli.values import warn_ignored_variables

if TYPE_CHECKING:
    from dtrain.config import Settings
    from dtrain.launch.options import LaunchOptions

VERBS = ("train", "evaluate", "predict")


def launch(
    program: Annotated[
        str, typer.Argument(metavar="SCRIPT.py | VERB", help="A Python script; or train, evaluate or predict.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGUMENTS ...]", help="Arguments of the script or verb.", show_default=False),
    ] = None,
    *,
    ranks: Annotated[
        int | None,
        typer.Option("-n", "--ranks", min=1, help="Ranks per node; default: one per GPU.", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Number of nodes.", show_default=False)] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            "--node-rank", min=0, help="Index of this node, from 0; default: in order of arrival.", show_default=False
        ),
    ] = None,
    rdzv: Annotated[
        str | None,
        typer.Option(
            "--rdzv", metavar="HOST:PORT", help="Address of the first node, HOST:PORT, the same on every node."
        ),
    ] = None,
    rdzv_timeout: Annotated[
        float | None,
        typer.Option("--rdzv-timeout", min=1, help="Seconds to wait for all nodes and ranks; default: 120."),
    ] = None,
    job_id: Annotated[str, typer.Option("--job-id", help="Identifies this job among others at the same address.")] = "",
    rdzv_secret_file: Annotated[
        Path | None,
        typer.Option(
            "--rdzv-secret-file",
            metavar="FILE",
            help="File with the secret shared by all nodes, mode 0600; default: DTRAIN_RDZV_SECRET.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="FILE", help="An Accelerate config file, such as launch/multi_gpu.yaml."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use CPUs: hide the GPUs from the ranks.")] = False,
    retries: Retries = 0,
    hang_seconds: Annotated[
        float | None,
        typer.Option(
            "--hang-seconds",
            min=0,
            help="Seconds without progress before a rank counts as hung; default: "
            "train.hang_seconds, no limit for a script.",
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option("--log-dir", metavar="DIR", help="Write each rank's output to DIR; default: the run's folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started; starts nothing.")] = False,
) -> None:
    """Run any Python script, or `dtrain train`, as N ranks on this machine or on several nodes.

    On several nodes the same command is given on each; each may have its own --node-rank; where srun starts it,
    one task a node, nodes and meeting place come from SLURM; so they do from Kubeflow's TrainJob and PyTorchJob,
    SkyPilot and SageMaker. Each rank gets RANK,
    WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which dtrain.prepare, Accelerate and
    torch.distributed.init_process_group() all read. If one rank fails, all others are terminated, on every node.

    Examples: dtrain launch -n 2 --cpu -- my_loop.py --epochs 3;
    dtrain launch --nodes 2 --node-rank 0 --rdzv node1:29500 -- train digits epochs=5
    """
    with reported():
        from dtrain.launch.env.slurm_env import read_step
        from dtrain.launch.options import LaunchOptions, among_tasks

        environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        asked = LaunchOptions(ranks, nodes, node_rank, rdzv, rdzv_timeout, job_id, environment, hang_seconds, log_dir)
        asked = replace(asked, secret_file=rdzv_secret_file)
        if profile is not None:
            from dtrain.cli.launch_profile import read_profile
            from dtrain.config.bundled import find

            asked = asked.over(read_profile(find(profile)))
        asked = among_tasks(asked, read_step())
        code = _launch(program, arguments or [], asked, dry_run, retries)
    raise typer.Exit(code)


def _launch(program: str, arguments: list[str], asked: LaunchOptions, dry_run: bool, retries: int) -> int:
    from dtrain.launch.options import dry_run_text, make_job, must_agree
    from dtrain.launch.supervisor import JobEnd, dtrain_argv, run_job, script_argv, told
    from dtrain.masking import hidden_variables, hide

    is_verb = program in VERBS and not Path(program).is_file()
    settings = _settings(arguments) if is_verb and program == "train" else None
    if settings is not None:
        log_own_config(arguments, as_words=True)
    files = _recipes_file(settings) if is_verb else _scripts_file(program)
    stop_seconds = _stop_seconds(settings) if is_verb and program == "train" else None
    if asked.hang_seconds is None and settings is not None:
        asked = replace(asked, hang_seconds=settings.config.train.hang_seconds)
    _check_not_launched(program)
    if is_verb:
        warn_ignored_variables()
    shown, hidden = hide(arguments) if is_verb else (arguments, {})
    asked = replace(asked, environment={**asked.environment, **hidden_variables(hidden)})
    job = make_job(asked)
    argv = dtrain_argv([program, *shown]) if is_verb else script_argv(program, arguments)
    if dry_run:
        typer.echo(dry_run_text(job, argv))
        return 0
    from dtrain.launch.retries import goes_on, run_variables, run_with_retries

    def attempt(run: Path | None) -> JobEnd:
        again, words = replace(make_job(asked), stop_seconds=stop_seconds, retries=retries), argv
        if run is not None and program == "train":
            again = replace(again, environment=again.environment | run_variables(run))
            words = goes_on(argv, run)
        return run_job(words, again, must_agree(asked, again, [program, *shown], files))

    ending = run_with_retries(attempt, retries, follows=job.node_rank > 0)
    emit_end(Events() if program == "train" and asked_for_events(arguments) else None, ending)
    return told(ending)


def _check_not_launched(program: str) -> None:
    from dtrain.errors import UsageError
    from dtrain.launch.env.conventions import read_pod
    from dtrain.launch.env.rank_env import launched, read_rank_facts

    if launched() and read_pod(os.environ) is None:
        facts = read_rank_facts()
        raise UsageError(
            f"this process is rank {facts.rank} of {facts.size} already (RANK, WORLD_SIZE): start {program} directly "
            "under that launcher, or unset both."
        )


def _settings(words: list[str]) -> Settings | None:
    """Checks what `train` is given, as far as can be without torch; with options among it, each rank does."""
    if any(word.startswith("-") for word in words):
        return None
    return read_target(words)


def _recipes_file(settings: Settings | None) -> dict[str, Path]:
    if settings is None:
        return {}
    from dtrain.config.recipe_file import locate

    path = locate(settings.config.recipe, settings.base)
    return {} if path is None else {path.name: path}


def _stop_seconds(settings: Settings | None) -> float:
    from dtrain.launch.env.job import DEFAULT_STOP_SECONDS

    return DEFAULT_STOP_SECONDS if settings is None else settings.config.train.stop_seconds


def _scripts_file(script: str) -> dict[str, Path]:
    from dtrain.config.recipe_file import check_syntax
    from dtrain.errors import UsageError, nearest

    path = Path(script)
    if path.is_file():
        check_syntax(path)
        return {path.name: path}
    if path.is_dir():
        raise UsageError(f"script {script}: is a folder. Name the script in it.")
    there = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    near = nearest(path.name, [*there, *VERBS])
    raise UsageError(f"script {script}: no such file (looked in {path.parent.resolve()}).{near}")
