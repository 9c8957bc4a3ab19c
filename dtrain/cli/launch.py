"""`dtrain launch`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.speaking import asked_for_events
from dtrain.cli.train import Retries, read_target, tell_own_config
from dtrain.cli.values import tell_ignored_variables
from dtrain.events import Events, tell_end

if TYPE_CHECKING:
    from dtrain.config import Settings
    from dtrain.launch.options import Asked

VERBS = ("train", "evaluate", "predict")


def launch(
    program: Annotated[
        str, typer.Argument(metavar="SCRIPT.py | VERB", help="A Python script; or train, evaluate or predict.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGUMENTS ...]", help="What the script or verb gets.", show_default=False),
    ] = None,
    *,
    ranks: Annotated[
        int | None,
        typer.Option("-n", "--ranks", min=1, help="Ranks on each node; else one for each GPU.", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Number of nodes.", show_default=False)] = None,
    node_rank: Annotated[
        int | None,
        typer.Option("--node-rank", min=0, help="Which of them this is, from 0; else by arrival.", show_default=False),
    ] = None,
    rdzv: Annotated[
        str | None,
        typer.Option("--rdzv", metavar="HOST:PORT", help="The first node's address, the same on every node."),
    ] = None,
    rdzv_timeout: Annotated[
        float | None,
        typer.Option("--rdzv-timeout", min=1, help="Seconds for all nodes and ranks to come; else 120."),
    ] = None,
    job_id: Annotated[
        str, typer.Option("--job-id", help="A word that tells this job from another one at the same address.")
    ] = "",
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="FILE", help="An Accelerate config file, such as launch/multi_gpu.yaml."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Hide the GPUs from the ranks.")] = False,
    retries: Retries = 0,
    hang_seconds: Annotated[
        float | None,
        typer.Option("--hang-seconds", min=0, help="How long a rank may stand still; else train's own, or for ever."),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option("--log-dir", metavar="DIR", help="Keep each rank's output in DIR; else in the run's folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and start nothing.")] = False,
) -> None:
    """Run any Python script, or `dtrain train`, as N ranks on this machine or on each of several.

    On several nodes the same command is given on each; each may have a --node-rank of its own; where srun starts it,
    one task a node, nodes and meeting place come from SLURM. Each rank gets RANK,
    WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which dtrain.prepare, Accelerate and
    torch.distributed.init_process_group() all read. When one rank fails, all others are ended, on every node.

    Examples: dtrain launch -n 2 --cpu -- my_loop.py --epochs 3;
    dtrain launch --nodes 2 --node-rank 0 --rdzv node1:29500 -- train digits epochs=5
    """
    with reported():
        from dtrain.launch.options import Asked, among_tasks
        from dtrain.launch.slurm_step import read_step

        environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        asked = Asked(ranks, nodes, node_rank, rdzv, rdzv_timeout, job_id, environment, hang_seconds, log_dir)
        if profile is not None:
            from dtrain.profiles import read_profile
            from dtrain.share import find

            asked = asked.over(read_profile(find(profile)))
        asked = among_tasks(asked, read_step())
        code = _launch(program, arguments or [], asked, dry_run, retries)
    raise typer.Exit(code)


def _launch(program: str, arguments: list[str], asked: Asked, dry_run: bool, retries: int) -> int:
    from dtrain.launch.local import Ending, dtrain_argv, run_job, script_argv, told
    from dtrain.launch.options import dry_run_text, make_job, must_agree

    is_verb = program in VERBS and not Path(program).is_file()
    settings = _settings(arguments) if is_verb and program == "train" else None
    if settings is not None:
        tell_own_config(arguments, as_words=True)
    files = _recipes_file(settings) if is_verb else _scripts_file(program)
    stop_seconds = _stop_seconds(settings) if is_verb and program == "train" else None
    if asked.hang_seconds is None and settings is not None:
        asked = replace(asked, hang_seconds=settings.config.train.hang_seconds)
    _check_not_launched(program)
    if is_verb:
        tell_ignored_variables()
    job = make_job(asked)
    argv = dtrain_argv([program, *arguments]) if is_verb else script_argv(program, arguments)
    if dry_run:
        typer.echo(dry_run_text(job, argv))
        return 0
    from dtrain.launch.retries import goes_on, run_variables, run_with_retries

    def attempt(run: Path | None) -> Ending:
        again, words = replace(make_job(asked), stop_seconds=stop_seconds), argv
        if run is not None and program == "train":
            again = replace(again, environment=again.environment | run_variables(run))
            words = goes_on(argv, run)
        return run_job(words, again, must_agree(asked, again, [program, *arguments], files))

    ending = run_with_retries(attempt, retries, follows=job.node_rank > 0)
    tell_end(Events() if program == "train" and asked_for_events(arguments) else None, ending)
    return told(ending)


def _check_not_launched(program: str) -> None:
    from dtrain.errors import UsageError
    from dtrain.launch.facts import launched, read_rank_facts

    if launched():
        facts = read_rank_facts()
        raise UsageError(
            f"this process is rank {facts.rank} of {facts.size} already (RANK, WORLD_SIZE): start {program} itself "
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
    from dtrain.recipe_file import locate

    path = locate(settings.config.recipe, settings.base)
    return {} if path is None else {path.name: path}


def _stop_seconds(settings: Settings | None) -> float:
    from dtrain.launch.job import DEFAULT_STOP_SECONDS

    return DEFAULT_STOP_SECONDS if settings is None else settings.config.train.stop_seconds


def _scripts_file(script: str) -> dict[str, Path]:
    from dtrain.errors import UsageError, nearest
    from dtrain.recipe_file import check_syntax

    path = Path(script)
    if path.is_file():
        check_syntax(path)
        return {path.name: path}
    if path.is_dir():
        raise UsageError(f"script {script}: is a folder. Give the script in it.")
    there = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    near = nearest(path.name, [*there, *VERBS])
    raise UsageError(f"script {script}: no such file (looked in {path.parent.resolve()}).{near}")
