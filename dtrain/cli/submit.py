"""`dtrain submit`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.train import METAVAR, log_own_config, read_target, with_own_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.config import Settings
    from dtrain.provenance.code import Code as LoadedCode
    from dtrain.slurm.freeze import Code
    from dtrain.slurm.request import JobRequest
    from dtrain.slurm.submission import PlannedRun
    from dtrain.trainer.plan import Plan

_JOB, _RANKS, _ARRAY, _SITE = "Resources", "How to start the ranks", "Several runs", "Cluster options"


def submit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False),
    ] = None,
    *,
    nodes: Annotated[int, typer.Option("--nodes", "-N", help="Number of nodes.", rich_help_panel=_JOB)] = 1,
    ranks: Annotated[
        int | None,
        typer.Option("-n", "--ranks", help="Ranks per node; default: one per GPU.", rich_help_panel=_JOB),
    ] = None,
    gpus_per_node: Annotated[
        str | None, typer.Option(metavar="[TYPE:]NUMBER", help="GPUs per node.", rich_help_panel=_JOB)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use CPUs only.", rich_help_panel=_JOB)] = False,
    time: Annotated[
        str | None,
        typer.Option(metavar="[D-]HH:MM:SS", help="Time limit; default: the partition's.", rich_help_panel=_JOB),
    ] = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option(help="CPUs per node, for all its ranks; default: one per rank.", rich_help_panel=_JOB),
    ] = None,
    mem: Annotated[str | None, typer.Option(help="Memory per node, such as 64G.", rich_help_panel=_JOB)] = None,
    partition: Annotated[
        str | None, typer.Option("--partition", "-p", help="Partition.", rich_help_panel=_SITE)
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", "-A", help="Account to charge.", rich_help_panel=_SITE)
    ] = None,
    qos: Annotated[
        str | None, typer.Option("--qos", "-q", help="Quality of service (QOS).", rich_help_panel=_SITE)
    ] = None,
    constraint: Annotated[
        str | None, typer.Option("--constraint", "-C", help="Required node features.", rich_help_panel=_SITE)
    ] = None,
    env_setup: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Shell file to source, which sets up the environment.", rich_help_panel=_SITE
        ),
    ] = None,
    container: Annotated[
        str,
        typer.Option(
            metavar="WORDS", help="Prefix of the ranks' command, such as apptainer exec.", rich_help_panel=_SITE
        ),
    ] = "",
    python: Annotated[
        str | None,
        typer.Option(help="Python of the ranks; default: this one, or python3 in a container.", rich_help_panel=_SITE),
    ] = None,
    sbatch_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="--NAME=VALUE", help="Extra sbatch option; repeatable.", rich_help_panel=_SITE),
    ] = None,
    srun_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="--NAME=VALUE", help="Extra srun option; repeatable.", rich_help_panel=_SITE),
    ] = None,
    job_name: Annotated[str | None, typer.Option(help="Job name; default: the run's.", rich_help_panel=_SITE)] = None,
    per_rank: Annotated[
        bool,
        typer.Option("--per-rank", help="One SLURM task per rank, no launcher.", rich_help_panel=_RANKS),
    ] = False,
    stop_before: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            help="Seconds before the time limit at which the run saves and stops.",
            rich_help_panel=_RANKS,
        ),
    ] = 120,
    requeues: Annotated[
        int, typer.Option(metavar="K", help="Max requeues without progress.", rich_help_panel=_RANKS)
    ] = 3,
    retries: Annotated[
        int,
        typer.Option(metavar="K", help="Max retries within the job after a failure.", rich_help_panel=_RANKS),
    ] = 0,
    array: Annotated[
        list[str] | None,
        typer.Option(metavar="GRID", help="One run per combination: 'lr=1e-3,1e-4 seed=1,2'.", rich_help_panel=_ARRAY),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(metavar="K", help="Max array tasks running at once.", rich_help_panel=_ARRAY)
    ] = None,
    freeze: Annotated[
        bool | None,
        typer.Option(
            "--freeze/--no-freeze",
            help="Copy the recipe's code, so that later edits don't affect the job: "
            "always, or never; default: if possible.",
            show_default=False,
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Don't build the recipe here, if the login node cannot.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script; writes and submits nothing.")
    ] = False,
) -> None:
    """Train on a SLURM cluster: check everything, write a batch script into the run's folder and submit it.

    The run saves before the time limit, and the job is requeued until training is
    complete.

    Examples: dtrain submit configs/digits.yaml --nodes 2 --gpus-per-node 8 --time 4:00:00;
    dtrain submit digits --cpu -n 2 --array 'lr=1e-3,1e-4 seed=1,2,3' --at-once 2
    """
    with reported():
        from dtrain.slurm.grid import read_grid
        from dtrain.slurm.request import JobRequest

        grid = None if array is None else read_grid(array)
        request = JobRequest(
            job_name="dtrain" if job_name is None else job_name,  # the run's name comes with the config
            nodes=nodes,
            ranks=ranks,
            gpus_per_node=gpus_per_node,
            cpu=cpu,
            per_rank=per_rank,
            time=time,
            partition=partition,
            account=account,
            qos=qos,
            constraint=constraint,
            cpus_per_task=cpus_per_task,
            mem=mem,
            env_setup=None if env_setup is None else env_setup.expanduser(),
            container=_split("--container", container),
            sbatch_args=tuple(sbatch_arg or ()),
            srun_args=tuple(srun_arg or ()),
            stop_before=stop_before,
            requeues=requeues,
            retries=retries,
            tasks=None if grid is None else len(grid),
            at_once=at_once,
        )
        request.check()
        _print_remarks(request)
        rank_python = python or ("python3" if request.container else sys.executable)
        runs, settings = _runs(words or [], grid, dry_run=dry_run)
        _print_sizes(runs, settings, request, check=not no_check, to_stderr=dry_run)
        _submit(runs, settings, request, named=job_name is not None, python=rank_python, freeze=freeze, dry_run=dry_run)


def _print_remarks(request: JobRequest) -> None:
    from dtrain.slurm.client import ignored_options

    unused = [f"{name} in the environment is ignored; pass it as an option" for name in ignored_options(os.environ)]
    for remark in (*request.remarks(), *unused):
        typer.echo(f"note: {remark}.", err=True)


def _split(option: str, text: str) -> tuple[str, ...]:
    from dtrain.errors import UsageError

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: should be shell words: {error}.") from None


def _runs(words: list[str], grid: list[list[str]] | None, *, dry_run: bool) -> tuple[list[PlannedRun], list[Settings]]:
    """Returns the runs and the config of each, checked as far as can be without torch."""
    from dtrain.errors import UsageError
    from dtrain.slurm.submission import check_folders, plan_runs

    dashed = next((word for word in words if word.startswith("-")), None)
    if dashed is not None:
        raise UsageError(f"{dashed!r}: should not begin with a dash like an option; write ./{dashed} for a file.")
    log_own_config(words, as_words=True, err=dry_run)
    words = with_own_config(words)  # named in the batch script, too
    base = read_target(words)
    for one in grid or ():
        alone = read_target([*words, *one])
        if alone.config.run != base.config.run:
            raise UsageError(f"--array: {' '.join(one)} sets run.name or run.dir, which --array sets for each run.")
    runs = plan_runs(words, base, grid)
    check_folders(runs, ask_queue=not dry_run)
    return runs, [read_target(list(run.words)) for run in runs]


def _print_sizes(
    runs: Sequence[PlannedRun], settings: list[Settings], request: JobRequest, *, check: bool, to_stderr: bool
) -> None:
    from dtrain.masking import hide

    per_node, size = request.ranks_per_node, request.world_size
    device = "CPUs" if request.cpu else "GPUs" if request.gpu_count else "all GPUs of the nodes"
    nodes = f"{request.nodes} node{'s' * (request.nodes > 1)}"
    lines = [f"{nodes} x {per_node} rank{'s' * (per_node > 1)} = {size} on {device}"]
    if check:
        with contextlib.redirect_stdout(sys.stderr if to_stderr else sys.stdout):  # a recipe may print
            lines += _checked(runs, settings, size)
    lines += [f"{run.name}: {' '.join(hide(run.differs)[0])}" for run in runs if run.differs]
    typer.echo("\n".join(lines), err=to_stderr)


def _checked(runs: Sequence[PlannedRun], settings: list[Settings], ranks: int) -> list[str]:
    """Builds the first run's objects, and checks the others' values against the recipe's signatures."""
    from dtrain.checkpoint.preflight import check_ahead
    from dtrain.errors import DtrainError, add_remark

    try:
        plan, code = _plan(settings, ranks)
    except Exception as error:
        if not isinstance(error, DtrainError):
            add_remark(error, "while building the recipe on this machine; --no-check skips this")
        raise
    for run, one in zip(runs, settings, strict=True):
        check_ahead(run.folder, one, ranks, code)
    unknown = "unknown: the loader has no length"
    batch = f"{plan.batch_per_rank} per rank, {plan.batch_in_all} global" if plan.batch_in_all else unknown
    steps = unknown
    if plan.steps_per_epoch is not None:
        steps = f"{plan.steps_per_epoch} per epoch, {plan.optimizer_steps} optimizer steps in {plan.epochs} epochs"
    which = f" (of {runs[0].name})" if len(runs) > 1 else ""
    return [f"batch: {batch}{which}", f"steps: {steps}{which}"]


def _plan(settings: list[Settings], ranks: int) -> tuple[Plan, LoadedCode]:
    from dtrain.distributed.lazy_dynamo import defer_dynamo
    from dtrain.distributed.seeding import seed_everything
    from dtrain.recipe.loader import bind, load_recipe
    from dtrain.recipe.signature import check_parameters
    from dtrain.trainer.plan import make_plan

    first = settings[0]
    defer_dynamo()
    seed_everything(first.config.train.seed)
    recipe = load_recipe(first.config.recipe, first.base)
    for one in settings[1:]:
        one.place(recipe.parameters())
        check_parameters(recipe.builders, recipe.path, one)
    return make_plan(bind(recipe, first), first, ranks), recipe.code


def _submit(
    runs: list[PlannedRun],
    settings: list[Settings],
    request: JobRequest,
    *,
    named: bool,
    python: str,
    freeze: bool | None,
    dry_run: bool,
) -> None:
    from dataclasses import replace

    from dtrain.masking import hide
    from dtrain.slurm.submission import code_of, config_of, frozen_words, submit_runs
    from dtrain.slurm.text import Script, output_pattern, script_text

    code, config = None, None
    if _can_freeze(settings[0], freeze):
        code, config = code_of(settings[0]), config_of(runs[0])
        runs = [frozen_words(run, None if code is None else code.name) for run in runs]
        _print_frozen(code, settings[0], to_stderr=dry_run)
    together = runs[0].name if request.tasks is None else runs[0].name.removesuffix("-0")
    if not named:
        request = replace(request, job_name=together)
    folder = runs[0].folder.with_name(together)
    script = Script(
        [hide(run.words)[0] for run in runs],  # the values are in the runs' secrets.json
        output_pattern(folder, array=request.tasks is not None),
        sys.executable,
        python,
        f"{together}, as dtrain submit wrote it in {Path.cwd()}",
    )
    text = script_text(request, script)
    if dry_run:
        typer.echo(text, nl=False)
        return
    job = submit_runs(runs, text, code, config)
    _print_job(job, runs)


def _can_freeze(settings: Settings, wanted: bool | None) -> bool:
    """Whether the code is copied: as wanted, else where it can be; says why where it cannot."""
    from dtrain.errors import UsageError
    from dtrain.slurm.submission import code_of

    if wanted is not None:
        return wanted
    try:
        code_of(settings)
    except UsageError as error:
        reason = str(error).removeprefix("--freeze: ")
        typer.echo(f"note: the code is not copied, so the job runs it as it is at its start: {reason}", err=True)
        return False
    return True


def _print_frozen(code: Code | None, settings: Settings, *, to_stderr: bool) -> None:
    installed = f"copied: the config; the recipe {settings.config.recipe} is installed and not copied"
    typer.echo(installed if code is None else code.told(), err=to_stderr)


def _print_job(job: str, runs: Sequence[PlannedRun]) -> None:
    folders = [str(run.folder) for run in runs]
    shown = folders[0] if len(folders) == 1 else f"{folders[0]} to {folders[-1]}"
    one = f"{job}_0" if runs[0].differs else job
    elsewhere = [] if runs[0].folder.parent == Path("runs") else ["--dir", str(runs[0].folder.parent)]
    what = {"watch": ["jobs"], "output": ["logs", one, "-f"], "end": ["cancel", job]}
    lines = [f"{name + ':':<10} {shlex.join(['dtrain', *verb, *elsewhere])}" for name, verb in what.items()]
    typer.echo("\n".join([f"submitted: job {job}", f"run:       {shown}", *lines]))
