"""`dtrain train`."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.console import AllRanks, Console, Format, Level, LogFormat
from dtrain.cli.guard import is_command_line, piped, reported
from dtrain.cli.ranks import on_ranks
from dtrain.errors import EXIT_FAILED

if TYPE_CHECKING:
    from dtrain.config import Settings
    from dtrain.distributed.world import World
    from dtrain.launch.env.rank_env import RankFacts

Retries = Annotated[
    int,
    typer.Option(
        "--retries",
        min=0,
        metavar="K",
        help="After a failure restart all ranks, resuming from the last checkpoint; "
        "give up after K failures without progress.",
        show_default=False,
    ),
]
METAVAR = "[CONFIG | RECIPE.py] [KEY=VALUE ...]"


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=METAVAR,
            help="A YAML config or a recipe; default: train.yaml in this folder, or the bundled digits. Then values, "
            "such as epochs=5.",
            show_default=False,
        ),
    ] = None,
    *,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=1, help="Number of ranks to start on this machine.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    retries: Retries = 0,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: resume the run in run.name's folder, if any. A run's folder: resume that run. A checkpoint: "
            "start a new run from it. Without CONFIG or RECIPE, that run's config is "
            "used. never: refuse an existing folder.",
        ),
    ] = "auto",
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN|FILE",
            help="Start a new run with the weights of another run (its best), a checkpoint, or a .safetensors or .pt "
            "file. Without CONFIG or RECIPE, that run's config is used.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; starts nothing.")] = False,
    fast_dev_run: Annotated[
        bool,
        typer.Option("--fast-dev-run", help="Smoke-test the whole pipeline with 2 optimizer steps; writes nothing."),
    ] = False,
    no_supervisor: Annotated[
        bool,
        typer.Option(
            "--no-supervisor", help="Train in this very process: no parent watches it for hangs and sudden ends."
        ),
    ] = False,
    log_format: Format = LogFormat.AUTO,
    all_ranks: AllRanks = False,
    log_level: Level = None,
) -> None:
    """Train. Without CONFIG or RECIPE: train.yaml in this folder, as `dtrain init` writes it, or the bundled digits.

    Examples: dtrain train epochs=5 lr=0.003; dtrain train my_recipe.py -n 2 --cpu
    """
    manner = Console(log_format, log_level, all_ranks=all_ranks)
    with reported(manner.events):
        if fast_dev_run:
            _refuse_beside_fast_dev_run(dry_run, retries, resume)
        code = _train(
            words or [],
            ranks,
            cpu,
            dry_run,
            retries,
            (resume, source),
            manner,
            fast_dev_run,
            supervisor=not no_supervisor,
        )
    raise typer.Exit(code)


def _train(  # noqa: PLR0917 - the options
    words: list[str],
    ranks: int | None,
    cpu: bool,
    dry_run: bool,
    retries: int,
    begins: tuple[str, str | None],
    manner: Console,
    fast_dev_run: bool,
    *,
    supervisor: bool,
) -> int:
    from dtrain.callbacks.tracking.wanted import check_installed
    from dtrain.launch.env.rank_env import read_rank_facts
    from dtrain.launch.signals.stop_request import hear_no_more, request_of_this_process

    manner.check()
    request = request_of_this_process() if not dry_run else None
    resume, source = begins
    settings = settings_to_train(words, resume, source, as_words=manner.events is None)
    if not fast_dev_run:
        check_installed(settings.config.track)
    if request is None:
        _show_plan(settings, ranks or read_rank_facts().size, cpu=cpu, as_words=manner.events is not None)
        return 0

    def hear() -> None:
        nonlocal request
        request = request_of_this_process()  # of a process that was forked off

    def work(world: World) -> None:
        assert request is not None  # noqa: S101 - for the type checker
        if fast_dev_run:
            from dtrain.callbacks.progress import ConsoleOptions
            from dtrain.trainer.fast_dev_run import fast_dev_run as go_through

            go_through(settings, world, request, manner.voice or ConsoleOptions())
            return
        from dtrain.trainer.train import train_run

        folder = train_run(settings, world, resume, request, manner.voice)
        if world.is_main:
            typer.echo(f"next: {shlex.join(['dtrain', 'evaluate', str(folder)])}")

    train = settings.config.train
    watch: dict[str, Any] = {
        "hang_seconds": train.hang_seconds,
        "stop_seconds": train.stop_seconds,
        "caught": request.numbers,
    }
    try:
        if retries and not _is_rank():
            return _retried(ranks or 1, retries, watch, manner)
        watched = functools.partial(_supervised, watch=watch, manner=manner, hear=hear) if supervisor else None
        return on_ranks(ranks, cpu, work, claims=lambda: claims_of(settings), manner=manner, watched=watched, **watch)
    finally:
        hear_no_more()


def _supervised(
    rank: Callable[[], int],
    facts: RankFacts,
    *,
    watch: Mapping[str, Any],
    manner: Console,
    hear: Callable[[], None],
) -> int:
    """Runs the only rank, or one of another launcher's, under a supervisor.

    Where this is not the command itself, or something else follows the process, it is just run.
    """
    from dtrain.cli.guard import reported
    from dtrain.launch.forked import can_be_forked
    from dtrain.launch.signals.process_exit import leave
    from dtrain.launch.supervisor import run_forked_rank, told

    if not (is_command_line() and can_be_forked()):
        return rank()

    def forked() -> None:
        code = EXIT_FAILED
        try:
            with reported(manner.events):
                hear()
                code = rank()
        except typer.Exit as end:
            code = end.exit_code
        leave(code)

    ending = run_forked_rank(forked, facts, **watch)
    if facts.size > 1 and ending.reported:  # by the rank, which has said so
        return ending.exit_code
    manner.emit_end(ending)
    return told(ending)


def _refuse_beside_fast_dev_run(dry_run: bool, retries: int, resume: str) -> None:
    from dtrain.errors import UsageError

    given = {"--dry-run": dry_run, "--retries": retries > 0, f"--resume {resume}": resume != "auto"}
    for option in (option for option, there in given.items() if there):
        raise UsageError(
            f"--fast-dev-run and {option} cannot be combined: it smoke-tests a run of its own and keeps nothing. Use "
            "only one of them."
        )


def _is_rank() -> bool:
    """Whether this process is a rank of a dtrain supervisor, which is the one to start it again."""
    from dtrain.errors import UsageError
    from dtrain.launch.env.rank_env import read_rank_facts
    from dtrain.launch.monitor.exit_report import supervised

    if read_rank_facts().launched and not supervised():
        raise UsageError(
            "--retries: this rank was started by another launcher, and only the launcher can restart all ranks. Remove "
            "it, or use `dtrain launch --retries K -- train ...`."
        )
    return supervised()


def _retried(ranks: int, retries: int, watch: dict[str, Any], manner: Console) -> int:
    from dtrain.launch.retries import goes_on, run_variables, run_with_retries
    from dtrain.launch.supervisor import JobEnd, dtrain_argv, run_local_ranks, told
    from dtrain.masking import hidden_variables, hide

    words, hidden = hide(sys.argv[1:])
    argv, variables = dtrain_argv(words), hidden_variables(hidden)

    def attempt(run: Path | None) -> JobEnd:
        if run is None:
            return run_local_ranks(argv, ranks, variables, **watch)
        return run_local_ranks(goes_on(argv, run), ranks, variables | run_variables(run), **watch)

    ending = run_with_retries(attempt, retries)
    manner.emit_end(ending)
    return told(ending)


def claims_of(settings: Settings) -> dict[str, str]:
    """Returns what must be the same on all ranks: the config and the recipe's content."""
    from dtrain.config.recipe_file import locate
    from dtrain.distributed.handshake import config_claims

    config = settings.config
    return config_claims(config.model_dump(), locate(config.recipe, settings.base))


def read_target(words: list[str]) -> Settings:
    """Resolves the words of the command line, and checks the recipe's file as far as can be without torch."""
    from dtrain.config import load_settings

    target, overrides = split_words(words)
    return _with_readable_recipe(load_settings(target, overrides))


def _with_readable_recipe(settings: Settings) -> Settings:
    from dtrain.config.recipe_file import WHERE_NOW, check_syntax, locate
    from dtrain.errors import RecipeError

    try:
        path = locate(settings.config.recipe, settings.base)
    except RecipeError as error:
        place = settings.place_of("recipe")
        where = "" if place == "command line" else f"{place}: "
        moved = WHERE_NOW if Path(settings.config.recipe).is_absolute() else ""
        raise RecipeError(f"{where}{error}{moved}{_kept_recipe(settings)}") from None
    if path is not None:
        check_syntax(path)
    return settings


def _kept_recipe(settings: Settings) -> str:
    """Returns words that name the copy which the run keeps of a recipe that is gone; none where there is none."""
    from dtrain.provenance.kept import newest

    run = settings.config.run
    copy = None if run.name is None else newest(Path(run.dir).expanduser() / run.name)
    file = None if copy is None else copy / Path(settings.config.recipe).name
    if file is None or not file.is_file():
        return ""
    return f" The run keeps a copy of the code it loaded: {shlex.join([f'recipe={file}'])} trains with it."


def settings_to_train(words: list[str], resume: str, source: str | None = None, *, as_words: bool) -> Settings:
    """Resolves the words of `dtrain train`, and says which config is taken that nobody has named.

    Where a run or a checkpoint is to be gone on from, and the words begin with neither a config nor a recipe, it is
    that run's own config: without the environment, and without its name for a new run that begins from a checkpoint.
    So it is where a new run begins with a run's weights.
    """
    from dtrain.cli.train_from import from_source, run_of
    from dtrain.config.saved import load_run_settings
    from dtrain.layout import CHECKPOINTS, CONFIG

    begun = [] if source is None else from_source(source)
    if resume in ("auto", "never") or (words and not _is_override(words[0])):
        named = bool(words) and not _is_override(words[0])
        run = None if source is None or named or any(one.startswith("recipe=") for one in words) else run_of(source)
        if run is not None:
            settings = load_run_settings(run, [*begun[1:], *words, begun[0]])
            _print_config(run / CONFIG, as_words=as_words)
            return _with_readable_recipe(settings)
        log_own_config(words, as_words=as_words)
        return read_target([*words, *begun[:1]])
    path = Path(resume).expanduser()
    run, anew = path, []
    if not (path / CONFIG).exists() and path.parent.name == CHECKPOINTS:
        run, anew = path.parent.parent, ["run.name=null"]
    settings = load_run_settings(run, [*anew, *words, *begun[:1]])
    _print_config(run / CONFIG, as_words=as_words)
    return _with_readable_recipe(settings)


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """Splits the words of the command line into the config or recipe, if one is named, and the overrides.

    Where none is named, neither by recipe=..., it is the current folder's own config, if it has one.
    """
    words = with_own_config(words)
    if words and not _is_override(words[0]):
        return words[0], words[1:]
    return None, words


def with_own_config(words: list[str]) -> list[str]:
    """Puts the current folder's own config before words that name neither a config nor a recipe."""
    from dtrain.config.bundled import OWN_CONFIG

    named = (words and not _is_override(words[0])) or any(word.startswith("recipe=") for word in words)
    own = Path(OWN_CONFIG)  # a link that leads nowhere is an error, and not passed over
    return words if named or not (own.is_file() or own.is_symlink()) else [OWN_CONFIG, *words]


def _is_override(word: str) -> bool:
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


def log_own_config(words: list[str], *, as_words: bool, err: bool = False) -> None:
    """Says that the current folder's own config is taken, once: nobody has named it."""
    taken = with_own_config(words)
    if taken != words:
        _print_config(taken[0], as_words=as_words, err=err)


def _print_config(file: str | Path, *, as_words: bool, err: bool = False) -> None:
    from dtrain.launch.env.rank_env import read_rank_facts
    from dtrain.launch.monitor.exit_report import supervised

    if as_words and not supervised() and read_rank_facts().rank == 0:
        typer.echo(f"config: {file}", err=err)


def _show_plan(settings: Settings, ranks: int, *, cpu: bool, as_words: bool) -> None:
    """Shows it; as words for a person, on standard error, where the standard output is for events."""
    from dtrain.distributed.fsdp_settings import chosen_sharding, launched_sharding
    from dtrain.distributed.lazy_dynamo import defer_dynamo
    from dtrain.distributed.world import computes_on_cpu
    from dtrain.trainer.plan import make_plan, plan_text, value_rows
    from dtrain.trainer.setup import load_bound

    chosen_sharding(settings.config.train, launched_sharding())  # refuses what a run would
    defer_dynamo()
    recipe, task = load_bound(settings)
    plan = plan_text(make_plan(task, settings, ranks, cpu=computes_on_cpu(cpu)), value_rows(settings, recipe))
    with piped():
        typer.echo(plan, err=as_words)
