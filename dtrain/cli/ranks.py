"""What every verb that computes on ranks does first and last."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.cli.speaking import Manner
    from dtrain.world import World


def on_ranks(
    ranks: int | None,
    cpu: bool,
    work: Callable[[World], None],
    *,
    claims: Callable[[], Mapping[str, str]] | None = None,
    hang_seconds: float | None = None,
    manner: Manner | None = None,
    **more: Any,
) -> int:
    """Runs a verb's work as one rank; or, asked for several and not launched as one of them, starts them.

    Args:
        ranks: the number asked for with -n, or None.
        cpu: compute on the CPU also where there is a GPU.
        work: what a rank does in the verified world.
        hang_seconds: how long a rank that is started here may stand still; 0 is for ever, and None says nothing.
        manner: how this process speaks as a rank, and tells how those that it starts have ended.
        more: as for `launch.local.run_local_ranks`.
        claims: returns what must be the same on all ranks, asked only where there are several.

    Returns:
        the exit code.
    """
    from dtrain.launch.facts import read_rank_facts
    from dtrain.launch.threads import set_threads

    facts = read_rank_facts()
    if ranks is not None and ranks > 1 and not facts.launched:
        from dtrain.launch.local import dtrain_argv, run_local_ranks, told

        ending = run_local_ranks(dtrain_argv(sys.argv[1:]), ranks, hang_seconds=hang_seconds, **more)
        if manner is not None:
            manner.tell_end(ending)
        return told(ending)
    if manner is not None:
        manner.speak(facts.rank)
    set_threads(facts.local_size)
    from dtrain.launch.heartbeat import DONE, SETUP, own_heartbeat
    from dtrain.launch.lifeline import hold_on
    from dtrain.launch.stacks import listen

    hold_on()
    listen()
    heartbeat = own_heartbeat()
    if heartbeat is not None:
        heartbeat.enter(SETUP)
    from dtrain.world import bring_up

    said = claims() if claims is not None and facts.size > 1 else None
    world = bring_up(cpu=cpu, asked=ranks, facts=facts, claims=said)
    from dtrain.deferred import defer_dynamo

    defer_dynamo()
    work(world)
    if heartbeat is not None:
        heartbeat.enter(DONE)
    world.close()
    return 0
