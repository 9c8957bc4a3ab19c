"""`dtrain find batch`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.guard import reported
from dtrain.cli.ranks import on_ranks
from dtrain.cli.train import METAVAR, read_target

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.tools.find.search import BatchTrial

_LEFT_ALONE = 0.1  # of the machine's free memory
_MOST = 1 << 20  # where the data set does not say how many samples it has
_GIB = 1 << 30


def batch(
    words: Annotated[
        list[str] | None, typer.Argument(metavar=METAVAR, help="As for `dtrain train`.", show_default=False)
    ] = None,
    *,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Number of ranks on this machine.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    most: Annotated[
        int | None, typer.Option("--max", min=1, help="Largest batch per rank to try; default: the dataset's size.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="Memory limit per rank in GiB; default: the whole GPU, or a rank's share of the free memory."
        ),
    ] = None,
) -> None:
    """Find the largest batch per rank that fits into memory, by doubling and bisection. Writes nothing.

    Each size is tried with a few train steps and a validation step in separate
    processes.

    Examples: dtrain find batch; dtrain find batch my_recipe.py -n 2 --cpu --memory 4
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with reported():
        code = _batch(words or [], Trials(words or [], ranks, cpu, _limit(memory, ranks)), most)
    raise typer.Exit(code)


def _leave(number: int, _: object) -> None:
    raise typer.Exit(128 + number)


def _limit(memory: float | None, ranks: int) -> tuple[int | None, int | None]:
    """Returns the bytes that a rank may take: as asked for, and of the machine's memory in any case."""
    from dtrain.errors import UsageError
    from dtrain.launch.env.memory import read_memory
    from dtrain.launch.env.rank_env import read_rank_facts

    if read_rank_facts().launched:
        raise UsageError("find batch starts its own ranks: run it without a launcher, with -n N.")
    if memory is not None and memory <= 0:
        raise UsageError(f"--memory {memory:g}: should be above 0, in GiB per rank.")
    there = read_memory()
    share = None if there is None else int(there.left * (1 - _LEFT_ALONE) / ranks)
    return (None if memory is None else int(memory * _GIB)), share


@dataclass
class Trials:
    """Tries batches, each in processes of its own.

    Attributes:
        words: the recipe and its parameters, as on the command line.
        ranks: how many.
        cpu: whether they compute on the CPU.
        limits: bytes that a rank may take: as asked for, and of the machine's memory.
        facts: what the first try has found there to be.
        tries: so far.
    """

    words: list[str]
    ranks: int
    cpu: bool
    limits: tuple[int | None, int | None]
    facts: dict[str, Any] = field(default_factory=dict)
    tries: list[BatchTrial] = field(default_factory=list)

    def run(self, size: int) -> BatchTrial | None:
        """Tries a batch; 0 is the recipe's own. Returns None where it failed for another reason than memory.

        Raises:
            DtrainError: the memory ran out before there was a batch to try.
        """
        from dtrain.errors import DtrainError
        from dtrain.launch.supervisor import dtrain_argv
        from dtrain.tools.find.search import BatchTrial

        with tempfile.TemporaryDirectory(prefix="dtrain-find-") as folder:
            out = Path(folder)
            asked, share = self.limits
            options = ["--batch", str(size), "--out", folder, "-n", str(self.ranks), *["--cpu"] * self.cpu]
            options += ["--asked", str(asked or 0), "--share", str(share or 0)]
            argv = [sys.executable, *dtrain_argv(["find", "try-batch", *options, "--", *self.words])]
            code, told = _run(argv)
            self.facts = self.facts or _read(out / "facts.json")
            result, lacking = _read(out / "result.json"), [_read(path) for path in sorted(out.glob("rank-*.json"))]
        if code == 0 and result:
            tried = BatchTrial(**result)
        elif lacking and (size or self.facts):
            peak = max(one["peak"] for one in lacking)
            tried = BatchTrial(size or self.facts["batch"], False, lacking[0]["why"], peak)
        elif lacking:
            raise DtrainError(
                f"the recipe does not fit even without a batch: {lacking[0]['why']}. Allow more "
                "memory per rank (--memory), or start fewer ranks (-n)."
            )
        else:
            typer.echo(told, err=True, nl=False)
            return None
        self.tries.append(tried)
        return tried


def _run(argv: list[str]) -> tuple[int, str]:
    """Runs a try, which ends with this process, however that one ends; returns its exit code, and what it told."""
    from dtrain.launch.signals.lifeline import PARENT

    environ = {**os.environ, PARENT: str(os.getpid())}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=environ, text=True, **pipes) as child:
        try:
            told = child.communicate()[1]
        except BaseException:
            child.terminate()
            raise
    return child.returncode, told


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class _Failed(Exception):  # noqa: N818 - no error of its own: its cause was told
    """A try failed for another reason than memory."""


def _batch(words: list[str], trials: Trials, most: int | None) -> int:
    from dtrain.errors import DtrainError
    from dtrain.tools.find.search import largest

    read_target(words)  # what is wrong with it is told once
    typer.echo(f"{'batch':>8} {'peak memory':>13} {'samples/s':>12}")
    first = trials.run(0)
    if first is None:
        return 1
    _print(first)

    def fits(size: int) -> bool:
        tried = first if size == first.batch else trials.run(size)
        if tried is None:
            raise _Failed
        if tried is not first:
            _print(tried)
        return tried.fits

    try:
        bounds = [bound for bound in (most, trials.facts["most"]) if bound is not None]
        found = largest(fits, first.batch, min(bounds, default=_MOST))
    except _Failed:
        return 1
    if found == 0:
        raise DtrainError(f"not even one sample fits: {trials.tries[-1].why}.")
    _print_found(found, trials, most)
    return 0


def _print(tried: BatchTrial) -> None:
    from dtrain.tools.doctor.words import size

    peak = "-" if tried.peak is None else size(tried.peak)
    if not tried.fits:
        typer.echo(f"{tried.batch:>8} {peak:>13} {'-':>12}  does not fit: {tried.why}")
        return
    rate = "-" if tried.samples_per_second is None else f"{tried.samples_per_second:,.0f}"
    typer.echo(f"{tried.batch:>8} {peak:>13} {rate:>12}")


def _print_found(found: int, trials: Trials, most: int | None) -> None:
    from dtrain.tools.doctor.words import many, size
    from dtrain.tools.find.search import estimate

    facts = trials.facts
    limit = "" if facts["limit"] is None else f", of {size(facts['limit'])}"
    end = "which is --max" if found == most else "the whole dataset" if found == facts["most"] else ""
    typer.echo(f"largest batch that fits: {found} samples per rank{limit}{', ' * bool(end)}{end}")
    taken = estimate(trials.tries)
    if taken is not None:
        parts = [
            f"parameters {size(taken.parameters)}",
            f"gradients {size(taken.gradients)}",
            f"optimizer states {size(taken.optimizer)}",
        ]
        if taken.per_sample is not None:
            parts += [f"each sample {size(taken.per_sample)}", f"other {size(taken.rest or 0)}"]
        typer.echo(f"estimate of a rank's memory: {', '.join(parts)}")
    key, of_loader = facts["key"], found * facts["times"]
    if key is None:
        typer.echo(
            f"next: set batch_size={of_loader} in the recipe's training DataLoader: "
            "build_dataloaders has no parameter batch_size"
        )
        return
    if facts["times"] > 1:
        typer.echo(
            f"train.batch=global: the loader's batch size is that of {many(facts['times'], 'rank')}, {of_loader}"
        )
    kept = [word for word in trials.words if word.partition("=")[0] not in (key, "batch_size")]
    options = [*(["-n", str(trials.ranks)] if trials.ranks > 1 else []), *["--cpu"] * trials.cpu]
    typer.echo(f"next: {shlex.join(['dtrain', 'train', *kept, f'{key}={of_loader}', *options])}")


def try_batch(  # noqa: PLR0917 - options
    words: Annotated[list[str] | None, typer.Argument()] = None,
    size: Annotated[int, typer.Option("--batch")] = 0,
    out: Annotated[Path, typer.Option()] = Path(),
    ranks: Annotated[int, typer.Option("-n")] = 1,
    cpu: Annotated[bool, typer.Option()] = False,
    asked: Annotated[int, typer.Option()] = 0,
    share: Annotated[int, typer.Option()] = 0,
) -> None:
    """Try one batch size, for `batch`."""
    from dtrain.launch.signals.lifeline import end_with_parent

    end_with_parent()
    with reported():
        settings = read_target(words or [])

        def work(world: World) -> None:
            from dtrain.tools.find.trial import try_batch

            limits = (asked,) if world.device.type == "cuda" else (asked, share)
            try_batch(settings, world, size, out, min((one for one in limits if one), default=None))

        code = on_ranks(ranks, cpu, work)
    raise typer.Exit(code)
