"""What is shown while it runs: live bars on a terminal, a table and a curve in a notebook, lines elsewhere, or events.

Global rank 0 alone speaks, where nothing else is asked for.
"""

from dtrain.callbacks.progress.bar import LiveBar
from dtrain.callbacks.progress.choose import choose_progress, progress_of
from dtrain.callbacks.progress.console_options import ConsoleOptions
from dtrain.callbacks.progress.feed import fed
from dtrain.callbacks.progress.plain import PlainLines, epoch_line, metrics_text
from dtrain.engine.facts import PassFacts, RunFacts

__all__ = [
    "ConsoleOptions",
    "LiveBar",
    "PassFacts",
    "PlainLines",
    "RunFacts",
    "choose_progress",
    "epoch_line",
    "fed",
    "metrics_text",
    "progress_of",
]
