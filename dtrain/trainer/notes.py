"""What a run writes down of itself: each start in `starts.jsonl`, and the facts that its checkpoints have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.checkpoint.compat import facts_of
from dtrain.checkpoint.saver import Checkpointer
from dtrain.config import Settings
from dtrain.engine.loop import Engine
from dtrain.layout import CHECKPOINTS
from dtrain.rundir.starts import here, noted


class RunContext(NamedTuple):
    """Where a run begins, or is resumed.

    Attributes:
        folder: the run's.
        ids: of its trackers' runs.
        came_from: the checkpoint that it is resumed from; None for a run that begins.
        accepted: in words, what differs from that and was accepted; on rank 0.
        facts: that checkpoint's manifest.
        samples: marks of the data; on rank 0.
        restored: names of the weights that it had; nothing for a run that begins.
    """

    folder: Path
    ids: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's, and never changed
    came_from: Path | None = None
    accepted: list[str] = []  # noqa: RUF012
    facts: dict[str, Any] = {}  # noqa: RUF012
    samples: dict[str, Any] = {}  # noqa: RUF012
    restored: frozenset[str] = frozenset()


def noted_start(engine: Engine, begun: RunContext) -> contextlib.AbstractContextManager[None]:
    """Has rank 0 note that training begins, and how it ends."""
    device = engine.world.device
    if not engine.world.is_main:
        return contextlib.nullcontext()
    code = engine.task.code
    facts = {
        **here(Path.cwd() if code is None else code.recipe.parent),
        "ranks": engine.world.size,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "checkpoint": None if begun.came_from is None else str(begun.came_from),
        "accepted": begun.accepted,
    }
    return noted(begun.folder, facts, lambda: int(engine.history.rows[-1]["epoch"]) if engine.history.rows else 0)


def keeper_of(
    engine: Engine, settings: Settings, begun: RunContext, tracking: Tracking | None, guard: Callable[[], None]
) -> Checkpointer:
    """Has the engine saved as the config says; each checkpoint asks the guard first whether the folder is owned."""
    config = settings.plain()  # now, since the recipe's file may be moved while the run trains
    accepted = begun.facts.get("accepted", []) + [[str(begun.came_from), *begun.accepted]] * bool(begun.accepted)

    def facts() -> dict[str, Any]:
        guard()
        ids = {} if tracking is None else tracking.ids()
        return {
            **facts_of(engine, config, begun.folder),
            "samples": begun.samples,
            "trackers": ids,
            "accepted": accepted,
        }

    keeper = Checkpointer(engine, begun.folder / CHECKPOINTS, settings.config.checkpoint, facts)
    passed = begun.facts.get("epoch_samples")
    keeper.passed_before = passed if isinstance(passed, int) else None
    keeper.guard = guard
    keeper.restored = begun.restored
    keeper.attach()
    return keeper
