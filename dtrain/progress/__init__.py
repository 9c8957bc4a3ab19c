"""What a person sees while it runs: a live bar on a terminal, plain lines elsewhere, from global rank 0 alone."""

from dtrain.progress.bar import LiveBar
from dtrain.progress.base import Progress, Several, Silent, together
from dtrain.progress.choose import choose_progress
from dtrain.progress.facts import PassFacts, RunFacts
from dtrain.progress.plain import PlainLines, epoch_line, metrics_text

__all__ = [
    "LiveBar",
    "PassFacts",
    "PlainLines",
    "Progress",
    "RunFacts",
    "Several",
    "Silent",
    "choose_progress",
    "epoch_line",
    "metrics_text",
    "together",
]
