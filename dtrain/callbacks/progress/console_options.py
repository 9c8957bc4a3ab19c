"""How a run that was started on the command line speaks: in which form, and through which ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from dtrain.callbacks.progress.choose import View, can_be_live, choose_progress
from dtrain.callbacks.progress.events import Events
from dtrain.callbacks.progress.jsonl import JsonLines
from dtrain.callbacks.progress.plain import PlainLines
from dtrain.engine.callback import EngineCallback
from dtrain.launch.terminal.guarded import on_screen


@dataclass(frozen=True)
class ConsoleOptions:
    """What the command line asked for.

    Attributes:
        view: how progress is shown, where there are no events.
        events: takes events instead; None where words are wanted.
        all_ranks: whether every rank tells of its progress, and not rank 0 alone.
        words: whether what happens to the run is said besides.
    """

    view: View = "auto"
    events: Events | None = None
    all_ranks: bool = False
    words: bool = True

    def say(self, text: str) -> None:
        """Prints a line of what happens to a run, where that is wanted; rank 0 calls it."""
        if self.words:
            print(on_screen(text, sys.stdout))  # noqa: T201

    def progress(self, rank: int, log_step_freq: int) -> EngineCallback | None:
        """Returns what shows a rank's progress; None for nothing.

        Args:
            rank: this one.
            log_step_freq: train steps between two lines or events.
        """
        if rank > 0 and not self.all_ranks:
            return None
        if self.events is not None:
            return JsonLines(self.events, log_step_freq, rank)
        if self.all_ranks:
            return PlainLines(log_step_freq, mark=False)  # each line begins with its rank
        return choose_progress(is_main=True, log_step_freq=log_step_freq, view=self.view)

    def make_way(self) -> None:
        """Has a rank that draws no bars print its lines so that those of rank 0, on the same terminal, stay whole."""
        from dtrain.callbacks.progress.region import Region, StdoutRedirect

        if self.events is None and not self.all_ranks and self.view != "plain" and can_be_live():
            StdoutRedirect(Region(sys.stdout, own=False)).begin()

    def tell(self, event: str, **facts: Any) -> None:
        """Tells of an event, where events are wanted; rank 0 calls it."""
        if self.events is not None:
            self.events.tell(event, **facts)
