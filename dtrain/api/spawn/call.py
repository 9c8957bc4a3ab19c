"""Calls a training function on ranks that are started for it, from a process that is none."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtrain.api.spawn.parcel import write_parcel
from dtrain.api.spawn.results import check_returnable, read_results
from dtrain.distributed.world import World, computes_on_cpu
from dtrain.errors import RankError, UsageError
from dtrain.launch.env.rank_env import read_rank_facts
from dtrain.launch.signals.left_behind import own_folder
from dtrain.launch.supervisor import JobEnd, run_local_ranks

if TYPE_CHECKING:
    import pandas as pd

_HANG_SECONDS = 600.0  # as for `dtrain train`
_PROGRAM = Path(__file__).with_name("rank.py")


def starts_ranks(num_processes: int | None, world: World | None) -> bool:
    """Whether a call shall run on ranks of its own; with None or 1 it runs in this process.

    Raises:
        UsageError: it is no number of processes, or the world is there already.
    """
    if num_processes is None:
        return False
    if isinstance(num_processes, bool) or not isinstance(num_processes, int) or num_processes < 1:
        raise UsageError(f"num_processes = {num_processes!r}: should be a whole number of at least 1.")
    if world is not None:
        raise UsageError(
            f"num_processes = {num_processes} starts new ranks, but world= is a rank of a running world ({world.rank} "
            f"of {world.size}). Use only one of the two."
        )
    facts = read_rank_facts()
    if facts.launched:
        raise UsageError(
            f"num_processes = {num_processes}: this process is rank {facts.rank} of {facts.size} already (RANK, "
            "WORLD_SIZE), so it cannot start ranks. Remove num_processes; the launcher has started the ranks."
        )
    return num_processes > 1


def call_on_ranks(
    function: Callable[..., pd.DataFrame],
    arguments: Mapping[str, Any],
    ranks: int,
    *,
    cpu: bool,
    meanwhile: Callable[[], None] | None = None,
) -> pd.DataFrame:
    """Calls `function(**arguments, world=world)` on ranks of this machine and waits for them.

    Nets, optimizers, schedulers and random generators that the arguments lead to, also through the variables of a
    function, are trained there and then get their new values here, in place. Where the call fails or is interrupted,
    they stay as they were.

    Args:
        function: a function of an importable module; it is called on every rank.
        arguments: what it is given; errors call them by these names.
        ranks: their number.
        cpu: whether they compute on the CPU also where there is an accelerator.
        meanwhile: called again and again while they run.

    Returns:
        the history, as the function returned it on rank 0.

    Raises:
        UsageError: an argument cannot be sent to other processes, or there are too few devices.
        RankError: a rank failed; its own words are in the message.
        KeyboardInterrupt: after Ctrl-C, or a notebook's interrupt; all ranks are ended by then.
    """
    import pandas as pd

    if not computes_on_cpu(cpu):
        _check_devices(ranks)
    with own_folder("call-") as name:
        folder = Path(name)
        changing = write_parcel(folder, function, arguments)
        check_returnable(changing)
        argv, relay = [str(_PROGRAM), name], meanwhile or True
        _raise_failure(run_local_ranks(argv, ranks, relayed=relay, hang_seconds=_HANG_SECONDS), ranks)
        history: pd.DataFrame = pd.DataFrame(read_results(folder, changing))
        return history


def _check_devices(ranks: int) -> None:
    count = torch.accelerator.device_count()
    if ranks > count:
        raise UsageError(
            f"num_processes = {ranks}: this machine has {count} {torch.accelerator.current_accelerator()} devices, and "
            f"each rank needs one. Use num_processes={count}, or compute on the CPU: cpu=True."
        )


def _raise_failure(ending: JobEnd, ranks: int) -> None:
    """Raises what a job that did not end well means for the caller."""
    if ending.signal == signal.SIGINT:
        raise KeyboardInterrupt(f"training was stopped and all {ranks} ranks were terminated; the model is unchanged.")
    if ending.signal is not None:
        signal.raise_signal(ending.signal)  # does what it would have done to this process without dtrain
    if ending.exit_code != 0:
        text = ending.text.removeprefix("dtrain: error: ")
        raise RankError(f"training on {ranks} ranks failed; all were terminated, and the model is unchanged.\n\n{text}")
