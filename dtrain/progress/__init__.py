"""What is shown while it runs: live bars on a terminal, a table and a curve in a notebook, lines elsewhere, or events.

Global rank 0 alone speaks, where nothing else is asked for.
"""

from dtrain.progress.bar import LiveBar
from dtrain.progress.base import Progress, Several, Silent, together
from dtrain.progress.choose import choose_progress, progress_of
from dtrain.progress.facts import PassFacts, RunFacts
from dtrain.progress.feed import fed
from dtrain.progress.plain import PlainLines, epoch_line, metrics_text
from dtrain.progress.voice import Voice

__all__ = [
    "LiveBar",
    "PassFacts",
    "PlainLines",
    "Progress",
    "RunFacts",
    "Several",
    "Silent",
    "Voice",
    "choose_progress",
    "epoch_line",
    "fed",
    "metrics_text",
    "progress_of",
    "together",
]
