"""`dtrain train`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.guard import piped, reported
from dtrain.cli.ranks import on_ranks
from dtrain.cli.speaking import AllRanks, Format, Level, LogFormat, Manner

if TYPE_CHECKING:
    from dtrain.config import Settings
    from dtrain.world import World

Retries = Annotated[
    int,
    typer.Option(
        "--retries",
        min=0,
        metavar="K",
        help="After a failure start all again, a run from its checkpoint; up to K times without progress in between.",
        show_default=False,
    ),
]
METAVAR = "[CONFIG | RECIPE.py] [KEY=VALUE ...]"


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=METAVAR,
            help="A YAML config, a recipe, or nothing: this folder's train.yaml, else the bundled digits. Then values, "
            "such as epochs=5.",
            show_default=False,
        ),
    ] = None,
    *,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=1, help="Start this many ranks on this machine.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU, also where there is a GPU.")] = False,
    retries: Retries = 0,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on with the run that is in run.name's folder, if any. PATH: with that run; of a checkpoint: "
            "begin a new run from it; with that run's config, where none is named.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and start nothing.")] = False,
    fast_dev_run: Annotated[
        bool,
        typer.Option(
            "--fast-dev-run", help="Go through all of a run in seconds, with 2 optimizer steps, and leave nothing."
        ),
    ] = False,
    log_format: Format = LogFormat.AUTO,
    all_ranks: AllRanks = False,
    log_level: Level = None,
) -> None:
    """Train. With nothing named: this folder's train.yaml, as `dtrain init` writes it, else the bundled digits.

    Examples: dtrain train epochs=5 lr=0.003; dtrain train my_recipe.py -n 2 --cpu
    """
    manner = Manner(log_format, log_level, all_ranks=all_ranks)
    with reported(manner.events):
        if fast_dev_run:
            _refuse_beside_fast_dev_run(dry_run, retries, resume)
        code = _train(words or [], ranks, cpu, dry_run, retries, resume, manner, fast_dev_run)
    raise typer.Exit(code)


def _train(  # noqa: PLR0917 - the options
    words: list[str],
    ranks: int | None,
    cpu: bool,
    dry_run: bool,
    retries: int,
    resume: str,
    manner: Manner,
    fast_dev_run: bool,
) -> int:
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.requests import hear_no_more, request_of_this_process
    from dtrain.tracking.wanted import check_installed

    manner.check()
    request = request_of_this_process() if not dry_run else None
    settings = settings_to_train(words, resume, as_words=manner.events is None)
    if not fast_dev_run:
        check_installed(settings.config.track)
    if request is None:
        _show_plan(settings, ranks or read_rank_facts().size, as_words=manner.events is not None)
        return 0

    def work(world: World) -> None:
        if fast_dev_run:
            from dtrain.fast_dev import fast_dev_run as go_through
            from dtrain.progress import Voice

            go_through(settings, world, request, manner.voice or Voice())
            return
        from dtrain.run import train_run

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
        return on_ranks(ranks, cpu, work, claims=lambda: claims_of(settings), manner=manner, **watch)
    finally:
        hear_no_more()


def _refuse_beside_fast_dev_run(dry_run: bool, retries: int, resume: str) -> None:
    from dtrain.errors import UsageError

    given = {"--dry-run": dry_run, "--retries": retries > 0, f"--resume {resume}": resume != "auto"}
    for option in (option for option, there in given.items() if there):
        raise UsageError(
            f"--fast-dev-run and {option} do not go together: it goes through a run of its own, from the beginning, "
            "and leaves nothing. Leave one of the two out."
        )


def _is_rank() -> bool:
    """Whether this process is a rank of a dtrain supervisor, which is the one to start it again."""
    from dtrain.errors import UsageError
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.reports import supervised

    if read_rank_facts().launched and not supervised():
        raise UsageError(
            "--retries: another launcher has started this rank, and only what starts all of them can start them again. "
            "Leave it out here, or use `dtrain launch --retries K -- train ...`."
        )
    return supervised()


def _retried(ranks: int, retries: int, watch: dict[str, Any], manner: Manner) -> int:
    from dtrain.launch.local import Ending, dtrain_argv, run_local_ranks, told
    from dtrain.launch.retries import goes_on, run_variables, run_with_retries

    argv = dtrain_argv(sys.argv[1:])

    def attempt(run: Path | None) -> Ending:
        if run is None:
            return run_local_ranks(argv, ranks, **watch)
        return run_local_ranks(goes_on(argv, run), ranks, run_variables(run), **watch)

    ending = run_with_retries(attempt, retries)
    manner.tell_end(ending)
    return told(ending)


def claims_of(settings: Settings) -> dict[str, str]:
    """Returns what must be the same on all ranks: the config and the recipe's content."""
    from dtrain.identity import config_claims
    from dtrain.recipe_file import locate

    config = settings.config
    return config_claims(config.model_dump(), locate(config.recipe, settings.base))


def read_target(words: list[str]) -> Settings:
    """Resolves the words of the command line, and checks the recipe's file as far as can be without torch."""
    from dtrain.config import load_settings

    target, overrides = split_words(words)
    return _with_readable_recipe(load_settings(target, overrides))


def _with_readable_recipe(settings: Settings) -> Settings:
    from dtrain.errors import RecipeError
    from dtrain.recipe_file import check_syntax, locate

    try:
        path = locate(settings.config.recipe, settings.base)
    except RecipeError as error:
        place = settings.place_of("recipe")
        raise error if place == "command line" else RecipeError(f"{place}: {error}") from None
    if path is not None:
        check_syntax(path)
    return settings


def settings_to_train(words: list[str], resume: str, *, as_words: bool) -> Settings:
    """Resolves the words of `dtrain train`, and says which config is taken that nobody has named.

    Where a run or a checkpoint is to be gone on from, and the words begin with neither a config nor a recipe, it is
    that run's own config: without the environment, and without its name for a new run that begins from a checkpoint.
    """
    if resume in ("auto", "never") or (words and not _is_override(words[0])):
        tell_own_config(words, as_words=as_words)
        return read_target(words)
    from dtrain.config.saved import CONFIG, load_run_settings

    path = Path(resume).expanduser()
    run, anew = path, []
    if not (path / CONFIG).exists() and path.parent.name == "checkpoints":
        run, anew = path.parent.parent, ["run.name=null"]
    settings = load_run_settings(run, [*anew, *words])
    _tell_config(run / CONFIG, as_words=as_words)
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
    from dtrain.share import OWN_CONFIG

    named = (words and not _is_override(words[0])) or any(word.startswith("recipe=") for word in words)
    own = Path(OWN_CONFIG)  # a link that leads nowhere is an error, and not passed over
    return words if named or not (own.is_file() or own.is_symlink()) else [OWN_CONFIG, *words]


def _is_override(word: str) -> bool:
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


def tell_own_config(words: list[str], *, as_words: bool, err: bool = False) -> None:
    """Says that the current folder's own config is taken, once: nobody has named it."""
    taken = with_own_config(words)
    if taken != words:
        _tell_config(taken[0], as_words=as_words, err=err)


def _tell_config(file: str | Path, *, as_words: bool, err: bool = False) -> None:
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.reports import supervised

    if as_words and not supervised() and read_rank_facts().rank == 0:
        typer.echo(f"config: {file}", err=err)


def _show_plan(settings: Settings, ranks: int, *, as_words: bool) -> None:
    """Shows it; as words for a person, on standard error, where the standard output is for events."""
    from dtrain.fsdp.settings import chosen_sharding, launched_sharding
    from dtrain.plan import make_plan, plan_text, value_rows
    from dtrain.recipe import bind, load_recipe
    from dtrain.seeding import seed_everything

    chosen_sharding(settings.config.train, launched_sharding())  # refuses what a run would
    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    task = bind(recipe, settings)
    plan = plan_text(make_plan(task, settings, ranks), value_rows(settings, recipe))
    with piped():
        typer.echo(plan, err=as_words)
