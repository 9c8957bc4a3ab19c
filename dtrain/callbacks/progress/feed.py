"""Progress of a rank shown by another process: a file of JSON lines, written here and read there.

A call with `num_processes` trains in ranks that it starts, and it is the caller who has the notebook or the terminal.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.callbacks.progress.choose import choose_progress
from dtrain.callbacks.progress.notebook import NotebookView
from dtrain.callbacks.progress.plain import PlainLines
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.facts import PassFacts, RunFacts

if TYPE_CHECKING:
    from dtrain.engine.metrics import MeanTable

_STEP_SECONDS = 0.1
_NAMES = (
    "split",
    "epoch",
    "steps",
    "skipped",
    "seconds",
    "within",
    "loader",
)  # of what is known of a pass when it begins


class FeedWriter(EngineCallback):
    """Writes what it is told, a step at most ten times a second.

    Args:
        path: the file; whoever starts the rank has it for this alone.
    """

    order = Order.PROGRESS

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: PassFacts | None = None
        self._next = 0.0

    def on_pass_start(self, facts: PassFacts) -> None:
        """A pass begins."""
        self._facts = facts
        told = {name: getattr(facts, name) for name in _NAMES}
        self._write(
            "on_pass_start", **told, epochs=facts.epochs, ranks=facts.run.ranks, samples=facts.samples(), lr=facts.lr()
        )

    def on_progress(self, table: MeanTable) -> None:
        """A step is done."""
        now = time.monotonic()
        if now < self._next or self._facts is None:
            return
        self._write(
            "on_progress",
            steps=table.steps,
            samples=self._facts.samples(),
            aside=self._facts.aside(),
            running=table.running(),
            lr=self._facts.lr(),
            status=list(self._facts.run.status),
        )
        self._next = time.monotonic() + _STEP_SECONDS

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """An epoch is done."""
        self._write("on_epoch_end", row=dict(row))

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """A validation within an epoch is done."""
        self._write("on_validation_end", row=dict(row))

    def _write(self, what: str, **facts: Any) -> None:
        # Python's own JSON, which has NaN: it is read by the class below alone.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, **facts}) + "\n")


@dataclass
class _RankProgress:
    """A rank's table and facts, as far as they were told."""

    steps: int = 0
    samples: int = 0
    lr: float | None = None
    aside: float = 0.0
    means: dict[str, float] = field(default_factory=dict)
    status: list[str] = field(default_factory=list)

    def running(self) -> dict[str, float]:
        """The means."""
        return self.means


class FeedReader:
    """Tells a listener what a `FeedWriter` was told.

    Args:
        path: the file.
        shown: the listener.
    """

    def __init__(self, path: Path, shown: EngineCallback) -> None:
        self._path = path
        self._shown = shown
        self._read = 0
        self._seen = _RankProgress()

    def poll(self) -> None:
        """Passes on what has come since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:  # nothing was told yet
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._write(**json.loads(line))

    def _write(self, what: str, **told: Any) -> None:
        if what in {"on_epoch_end", "on_validation_end"}:
            getattr(self._shown, what)(told["row"])
            return
        if what == "on_pass_start":
            seen = self._seen = _RankProgress(told["skipped"], told["samples"], told["lr"])
            run = RunFacts(told["epochs"], told["ranks"], lambda: seen.lr, status=seen.status)
            known = {name: told[name] for name in _NAMES}
            self._shown.on_pass_start(
                PassFacts(**known, samples=lambda: seen.samples, aside=lambda: seen.aside, run=run)
            )
            return
        seen = self._seen
        seen.aside, seen.status[:] = told["aside"], told["status"]
        seen.steps, seen.samples, seen.means, seen.lr = told["steps"], told["samples"], told["running"], told["lr"]
        self._shown.on_progress(seen)  # type: ignore[arg-type]


@contextlib.contextmanager
def fed(
    verbose: bool | EngineCallback, *, log_step_freq: int
) -> Iterator[tuple[bool | EngineCallback, Callable[[], None] | None]]:
    """Has this process show the progress of ranks that it starts, where it has more than lines for it.

    Args:
        verbose: as for `dtrain.train_model`.
        log_step_freq: train steps between two plain lines.

    Yields:
        what the ranks get in place of `verbose`, and what is to be called again and again meanwhile, if anything.
    """
    own = verbose if isinstance(verbose, NotebookView) else None  # which no rank could show
    shown = choose_progress(is_main=True, log_step_freq=log_step_freq) if verbose is True else own
    if shown is None or isinstance(shown, PlainLines):  # which the rank prints itself, and they are passed on
        yield verbose, None
        return
    with tempfile.TemporaryDirectory(prefix="dtrain-feed-") as folder:
        path = Path(folder) / "progress.jsonl"
        reader = FeedReader(path, shown)
        try:
            yield FeedWriter(path), reader.poll
        finally:
            try:
                reader.poll()
            finally:
                shown.close()
