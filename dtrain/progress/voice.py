"""How a run that was started on the command line speaks: in which form, and through which ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtrain.events import Events
from dtrain.progress.base import Progress, Silent
from dtrain.progress.choose import View, choose_progress
from dtrain.progress.jsonl import JsonLines


@dataclass(frozen=True)
class Voice:
    """What the command line asked for.

    Attributes:
        view: how progress is shown, where there are no events.
        events: takes events instead; None where words are wanted.
        all_ranks: whether every rank tells of its progress, and not rank 0 alone.
    """

    view: View = "auto"
    events: Events | None = None
    all_ranks: bool = False

    def progress(self, rank: int, epochs: int, log_step_freq: int) -> Progress:
        """Returns what a rank tells its progress to.

        Args:
            rank: this one.
            epochs: of the run.
            log_step_freq: train steps between two lines or events.
        """
        if rank > 0 and not self.all_ranks:
            return Silent()
        if self.events is not None:
            return JsonLines(self.events, log_step_freq, rank)
        view: View = "plain" if self.all_ranks else self.view
        return choose_progress(is_main=True, epochs=epochs, log_step_freq=log_step_freq, view=view)

    def tell(self, event: str, **facts: Any) -> None:
        """Tells of an event, where events are wanted; rank 0 calls it."""
        if self.events is not None:
            self.events.tell(event, **facts)
