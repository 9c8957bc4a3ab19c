"""Parts of the set-up that may fail on one rank alone: all ranks hear of it, so that none waits for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from dtrain.distributed.world import World
from dtrain.errors import AgreedError
from dtrain.errors import Failure as RankFailure
from dtrain.launch.monitor.describe import describe
from dtrain.launch.signals.stop_request import is_ctrl_c

T = TypeVar("T")


def agree(world: World, attempt: Callable[[], T]) -> T:
    """Runs a part of the set-up on every rank and lets all know how it went.

    Raises:
        AgreedError: it failed on some rank; all ranks raise, so that none waits for the others.
    """
    result: Any = None
    failure: RankFailure | None = None
    try:
        result = attempt()
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        text, exit_code = describe(error)
        failure = RankFailure(world.rank, text, exit_code, type(error).__name__)
    told = world.gather_json(None if failure is None else asdict(failure))
    failures = [RankFailure(**item) for item in told if item is not None]
    if failures:
        raise AgreedError(failures)
    return result  # type: ignore[no-any-return]
