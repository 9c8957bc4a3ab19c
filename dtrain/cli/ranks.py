"""What every verb that computes on ranks does first and last."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dtrain.wording import counted

if TYPE_CHECKING:
    from dtrain.cli.console import Console
    from dtrain.distributed.world import World
    from dtrain.launch.env.rank_env import RankFacts


_MOST_RANKS, _MOST_PER_CORE = 64, 4  # of one machine


def on_ranks(
    ranks: int | None,
    cpu: bool,
    work: Callable[[World], None],
    *,
    claims: Callable[[], Mapping[str, str]] | None = None,
    hang_seconds: float | None = None,
    manner: Console | None = None,
    to_read: bool = False,
    watched: Callable[[Callable[[], int], RankFacts], int] | None = None,
    **more: Any,
) -> int:
    """Runs a verb's work as one rank; or, asked for several and not launched as one of them, starts them.

    Args:
        ranks: the number asked for with -n, or None.
        cpu: compute on the CPU also where there is a GPU.
        work: what a rank does in the verified world.
        hang_seconds: how long a rank that is started here may stand still; 0 is for ever, and None says nothing.
        manner: how this process speaks as a rank, and tells how those that it starts have ended.
        to_read: whether all that there is of the work is what it prints: a reader who goes has then seen enough.
        watched: runs a rank that no supervisor of dtrain's has started, and returns its exit code; by default it is
            just called.
        more: as for `dtrain.launch.supervisor.run_local_ranks`.
        claims: returns what must be the same on all ranks, asked only where there are several.

    Returns:
        the exit code.
    """
    from dtrain.launch.env.rank_env import read_rank_facts
    from dtrain.launch.monitor.exit_report import supervised

    facts = read_rank_facts()
    if ranks is not None and ranks > 1 and not facts.launched:
        _refuse_too_many(ranks)
        from dtrain.launch.supervisor import dtrain_argv, run_local_ranks, told
        from dtrain.launch.terminal.guarded import readers_matter
        from dtrain.masking import hidden_variables, hide

        words, hidden = hide(sys.argv[1:])
        variables = hidden_variables(hidden)
        with readers_matter() if to_read else contextlib.nullcontext():
            ending = run_local_ranks(dtrain_argv(words), ranks, variables, hang_seconds=hang_seconds, **more)
        if manner is not None:
            manner.emit_end(ending)
        return told(ending)

    def rank() -> int:
        return _as_rank(facts, ranks, cpu, work, claims, hang_seconds, manner)

    return rank() if watched is None or (facts.launched and supervised()) else watched(rank, facts)


def _refuse_too_many(ranks: int) -> None:
    """Refuses a number of ranks that would only bring this machine to a standstill, such as that of the samples."""
    from dtrain.errors import UsageError

    cores = os.cpu_count() or 1
    if ranks > max(_MOST_RANKS, _MOST_PER_CORE * cores):
        raise UsageError(
            f"-n {ranks}: this machine has {counted(cores, 'core')}, and each rank is a process of its own. Start one "
            f"rank for each GPU, or on the CPU at most one for each core: -n {cores}."
        )


def _as_rank(  # noqa: PLR0917 - called at one place with all of them
    facts: RankFacts,
    ranks: int | None,
    cpu: bool,
    work: Callable[[World], None],
    claims: Callable[[], Mapping[str, str]] | None,
    hang_seconds: float | None,
    manner: Console | None,
) -> int:
    if manner is not None:
        manner.speak(facts.rank)
    from dtrain.launch.env.job import HANG
    from dtrain.launch.env.threads import set_threads

    set_threads(facts.local_size)
    from dtrain.launch.monitor.exit_report import fix_identity, supervised
    from dtrain.launch.monitor.heartbeat import DONE, SETUP, own_heartbeat
    from dtrain.launch.monitor.stack_dump import listen
    from dtrain.launch.signals.exiting import report_os_exit
    from dtrain.launch.signals.lifeline import end_with_parent
    from dtrain.launch.signals.process_exit import set_exit_timeout

    fix_identity()
    if supervised() and facts.size > 1 and hang_seconds is not None:  # torch's own limit then comes after the watch
        os.environ.setdefault(HANG, str(hang_seconds))
    set_exit_timeout(hang_seconds or 0.0)
    end_with_parent()
    listen()
    heartbeat = own_heartbeat()
    if heartbeat is not None:
        heartbeat.enter(SETUP)
    from dtrain.distributed.world import bring_up

    said = claims() if claims is not None and facts.size > 1 else None
    world = bring_up(cpu=cpu, asked=ranks, facts=facts, claims=said)
    from dtrain.distributed.lazy_dynamo import defer_dynamo

    defer_dynamo()
    with contextlib.nullcontext() if supervised() else report_os_exit():
        work(world)
    if heartbeat is not None:
        heartbeat.enter(DONE)
    world.close()
    return 0
