"""`dtrain train`."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Annotated

import typer

from dtrain.cli.guard import reported


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG | RECIPE.py] [KEY=VALUE ...]",
            help="A YAML config, a recipe, or nothing for the bundled digits; then values, such as epochs=5.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=1, help="Start this many ranks on this machine.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU, also where there is a GPU.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and start nothing.")] = False,
) -> None:
    """Train. With nothing named: the bundled digits, 3 epochs.

    Examples: dtrain train epochs=5 lr=0.003; dtrain train my_recipe.py -n 2 --cpu
    """
    with reported():
        code = _train(words or [], ranks, cpu, dry_run)
    raise typer.Exit(code)


def _train(words: list[str], ranks: int | None, cpu: bool, dry_run: bool) -> int:
    from dtrain.config import load_settings
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.threads import set_threads
    from dtrain.recipe_file import check_syntax, locate

    facts = read_rank_facts()
    target, overrides = split_words(words)
    settings = load_settings(target, overrides)
    path = locate(settings.config.recipe, settings.base)
    if path is not None:
        check_syntax(path)
    if dry_run:
        _show_plan(settings, ranks or facts.size)
        return 0
    if ranks is not None and ranks > 1 and not facts.launched:
        from dtrain.launch.local import dtrain_argv, start_local_ranks

        return start_local_ranks(dtrain_argv(sys.argv[1:]), ranks)
    set_threads(facts.local_size)
    from dtrain.launch.lifeline import hold_on

    hold_on()
    from dtrain.run import train_run
    from dtrain.world import bring_up

    world = bring_up(cpu=cpu, asked=ranks, facts=facts)
    train_run(settings, world)
    if world.is_main:
        typer.echo(_next_command(words, world.size))
    world.close()
    return 0


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """Splits the words of the command line into the config or recipe, if one is named, and the overrides."""
    if words and not re.match(r"[A-Za-z_][\w.]*=", words[0]):
        return words[0], words[1:]
    return None, words


def _show_plan(settings: object, ranks: int) -> None:
    from dtrain.config import Settings
    from dtrain.plan import make_plan, plan_text, value_rows
    from dtrain.recipe import bind, load_recipe
    from dtrain.seeding import seed_everything

    assert isinstance(settings, Settings)  # noqa: S101
    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    task = bind(recipe, settings)
    typer.echo(plan_text(make_plan(task, settings, ranks), value_rows(settings, recipe), settings.config.train.epochs))


def _next_command(words: list[str], size: int) -> str:
    """The command that shows what dtrain is for: the same run on more ranks."""
    again = shlex.join(["dtrain", "train", *words, "-n", str(size + 1), "--cpu"])
    return f"next: {again}   # the same steps on {size + 1} ranks, the same truth in the numbers"
