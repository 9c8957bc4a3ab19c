"""`dtrain train`."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.guard import reported
from dtrain.cli.ranks import on_ranks

if TYPE_CHECKING:
    from dtrain.config import Settings
    from dtrain.world import World

METAVAR = "[CONFIG | RECIPE.py] [KEY=VALUE ...]"


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=METAVAR,
            help="A YAML config, a recipe, or nothing for the bundled digits; then values, such as epochs=5.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=1, help="Start this many ranks on this machine.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU, also where there is a GPU.")] = False,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on with the run that is in run.name's folder, if any. PATH: with that run; of a checkpoint: "
            "begin a new run from it.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and start nothing.")] = False,
) -> None:
    """Train. With nothing named: the bundled digits, 3 epochs.

    Examples: dtrain train epochs=5 lr=0.003; dtrain train my_recipe.py -n 2 --cpu
    """
    with reported():
        code = _train(words or [], ranks, cpu, dry_run, resume)
    raise typer.Exit(code)


def _train(words: list[str], ranks: int | None, cpu: bool, dry_run: bool, resume: str) -> int:
    from dtrain.launch.facts import read_rank_facts

    settings = read_target(words)
    if dry_run:
        _show_plan(settings, ranks or read_rank_facts().size)
        return 0

    def work(world: World) -> None:
        from dtrain.run import train_run

        folder = train_run(settings, world, resume)
        if world.is_main:
            typer.echo(f"next: {shlex.join(['dtrain', 'evaluate', str(folder)])}")

    return on_ranks(ranks, cpu, work, claims=lambda: _claims(settings), hang_seconds=settings.config.train.hang_seconds)


def _claims(settings: Settings) -> dict[str, str]:
    from dtrain.identity import config_claims
    from dtrain.recipe_file import locate

    config = settings.config
    return config_claims(config.model_dump(), locate(config.recipe, settings.base))


def read_target(words: list[str]) -> Settings:
    """Resolves the words of the command line, and checks the recipe's file as far as can be without torch."""
    from dtrain.config import load_settings
    from dtrain.recipe_file import check_syntax, locate

    target, overrides = split_words(words)
    settings = load_settings(target, overrides)
    path = locate(settings.config.recipe, settings.base)
    if path is not None:
        check_syntax(path)
    return settings


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """Splits the words of the command line into the config or recipe, if one is named, and the overrides."""
    if words and not re.match(r"[A-Za-z_][\w.]*=", words[0]):
        return words[0], words[1:]
    return None, words


def _show_plan(settings: Settings, ranks: int) -> None:
    from dtrain.plan import make_plan, plan_text, value_rows
    from dtrain.recipe import bind, load_recipe
    from dtrain.seeding import seed_everything

    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    task = bind(recipe, settings)
    typer.echo(plan_text(make_plan(task, settings, ranks), value_rows(settings, recipe), settings.config.train.epochs))
