"""`dtrain launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.guard import reported


def launch(
    script: Annotated[str, typer.Argument(metavar="SCRIPT.py", help="A Python script, with or without dtrain in it.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGUMENTS ...]", help="What the script gets.", show_default=False),
    ] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Start this many ranks on this machine.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Hide the GPUs from the script.")] = False,
) -> None:
    """Run any Python script as N ranks on this machine.

    Each rank gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which dtrain.prepare,
    Accelerate and torch.distributed.init_process_group() all read. When one rank fails, the others are ended.

    Examples: dtrain launch -n 2 --cpu -- my_loop.py --epochs 3
    """
    with reported():
        code = _launch(script, arguments or [], ranks, cpu)
    raise typer.Exit(code)


def _launch(script: str, arguments: list[str], ranks: int, cpu: bool) -> int:
    from dtrain.errors import UsageError
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.local import script_argv, start_local_ranks

    _check_script(script, ranks)
    facts = read_rank_facts()
    if facts.launched:
        raise UsageError(
            f"this process is rank {facts.rank} of {facts.size} already (RANK, WORLD_SIZE): start {script} itself "
            "under that launcher, or unset both."
        )
    return start_local_ranks(script_argv(script, arguments), ranks, _cpu_only() if cpu else {})


def _check_script(script: str, ranks: int) -> None:
    from dtrain.errors import UsageError, nearest
    from dtrain.recipe_file import check_syntax

    path = Path(script)
    if path.is_file():
        check_syntax(path)
        return
    if script == "train":
        raise UsageError(
            f"dtrain launch runs a script. To train a recipe on {ranks} ranks: dtrain train -n {ranks} ..."
        )
    if path.is_dir():
        raise UsageError(f"script {script}: is a folder. Give the script in it.")
    there = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    raise UsageError(f"script {script}: no such file (looked in {path.parent.resolve()}).{nearest(path.name, there)}")


def _cpu_only() -> dict[str, str]:
    return {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
