"""TensorBoard and trackio, by way of Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.callbacks.tracking.about import as_parameters
from dtrain.callbacks.tracking.base import RunEnd, TrackedRun
from dtrain.callbacks.tracking.media_notes import MediaNotes
from dtrain.callbacks.tracking.mlflow_tracker import MlflowBackend
from dtrain.callbacks.tracking.threaded import Backend
from dtrain.config.schema import TrackConfig, TrackioConfig
from dtrain.files import make_folder
from dtrain.rundir.media import Entry, read_media

TENSORBOARD = "tensorboard"  # folder of its events, in the run's


class TensorBoardBackend:
    """TensorBoard's event files, in `tensorboard/` of the run's folder; the scalars in double precision.

    What a killed run wrote after the checkpoint that it goes on from is hidden by TensorBoard's own `purge_step`:
    it has one for all scalars, so those of moments and of epochs have a folder each. What it did not write before it
    was killed, nobody can tell from outside: so a resumed run hides all epochs' scalars and writes them again.
    """

    name = "tensorboard"

    def __init__(self, what: TrackedRun) -> None:
        self._what = what

    def load(self) -> bool:
        """Loads the library."""
        from torch.utils import tensorboard  # noqa: F401

        return False

    def start(self) -> str:
        """Opens two event files."""
        from accelerate.tracking import TensorBoardTracker

        folder = make_folder(self._what.folder.absolute(), TENSORBOARD)
        # Always, since TensorBoard takes only the second one of a folder for a restart.
        purge = {"epochs": 1, "steps": self._what.updates + 1}
        self._writers = {part: TensorBoardTracker(part, folder, purge_step=step) for part, step in purge.items()}
        for writer in self._writers.values():
            writer.start()
        self._media = MediaNotes(self._what.folder, self.name, upto=self._what.updates)
        if self._media.are_new:  # what earlier versions sent they did not note
            known = read_media(self._what.folder) if self._what.ids.get(self.name) else []
            self._media.add(*(entry for entry in known if entry.step <= self._what.updates))
        texts = {"config": _as_code(self._what.config), "about": _as_code(self._what.about)}
        self._writers["epochs"].log(texts, step=0)
        return TENSORBOARD

    def last_epoch(self) -> int:
        """What is there is hidden."""
        return 0

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Writes scalars; their step is the epoch, or the number of optimizer steps."""
        part = "epochs" if "epoch" in values else "steps"
        numbers = {name: value for name, value in values.items() if value is not None}
        # Its other form has 32 bits, and is not what the history says.
        self._writers[part].log(numbers, step=step, new_style=True, double_precision=True)
        if part == "epochs":
            self._writers[part].tracker.flush()  # by itself it does every two minutes

    def log_media(self, entry: Entry, folder: Path) -> None:
        """Writes an image, a histogram or a text of a hook's; files have no place there."""
        if entry in self._media:
            return
        writer = self._writers["steps"].tracker
        if entry.kind == "image":
            from PIL import Image

            with Image.open(folder / entry.file) as image:
                writer.add_image(entry.name, np.asarray(image.convert("RGB")), entry.step, dataformats="HWC")
        elif entry.kind == "text":
            writer.add_text(entry.name, (folder / entry.file).read_text(encoding="utf-8"), entry.step)
        elif entry.kind == "histogram":
            counts, edges = np.asarray(entry.counts), np.asarray(entry.edges)
            middles = (edges[1:] + edges[:-1]) / 2
            sums = float(counts @ middles), float(counts @ middles**2)
            writer.add_histogram_raw(
                entry.name,
                edges[0],
                edges[-1],
                int(counts.sum()),
                *sums,
                edges[1:].tolist(),
                counts.tolist(),
                entry.step,
            )
        writer.flush()
        self._media.add(entry)

    def finish(self, end: RunEnd) -> None:
        """Writes the history as a table."""
        if end.complete and end.rows:
            self._writers["epochs"].log({"history": _markdown(end.rows)}, step=len(end.rows))
        for writer in self._writers.values():
            writer.finish()


class TrackioBackend:
    """trackio: its run has the name of the dtrain run."""

    name = "trackio"

    def __init__(self, options: TrackioConfig, what: TrackedRun) -> None:
        self._options, self._what = options, what

    def load(self) -> bool:
        """Loads the library."""
        import trackio  # noqa: F401

        return False

    def start(self) -> str:
        """Starts a run, or resumes it."""
        from accelerate.tracking import TrackioTracker

        before = self._what.ids.get(self.name)
        self._media = MediaNotes(self._what.folder, self.name)
        self._name = name = before or self._what.folder.name
        self._tracker = TrackioTracker(
            self._options.project,
            name=name,
            resume="allow" if before else "never",
            config=as_parameters({**self._what.config, "about": dict(self._what.about)}),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._tracker.start()
        return name

    def last_epoch(self) -> int:
        """Returns the last epoch in trackio's store on this machine."""
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(self._options.project, self._name)
        return max((int(row["epoch"]) for row in rows if row.get("epoch") is not None), default=0)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs values; their step is the epoch, or the number of optimizer steps."""
        self._tracker.log({name: value for name, value in values.items() if value is not None}, step=step)

    def log_media(self, entry: Entry, folder: Path) -> None:
        """Logs an image, a histogram or a text of a hook's; files of a run have no place there."""
        import trackio

        if entry in self._media:
            return
        if entry.kind == "image":
            self._tracker.log({entry.name: trackio.Image(str(folder / entry.file))}, step=entry.step)
        elif entry.kind == "text":
            text = (folder / entry.file).read_text(encoding="utf-8")
            self._tracker.log({entry.name: trackio.Markdown(text)}, step=entry.step)
        elif entry.kind == "histogram":
            counted = (np.asarray(entry.counts), np.asarray(entry.edges))
            self._tracker.log({entry.name: trackio.Histogram(np_histogram=counted)}, step=entry.step)
        self._media.add(entry)

    def finish(self, end: RunEnd) -> None:
        """Ends the run; the history is in its metrics."""
        self._tracker.finish()


def backends(track: TrackConfig, what: TrackedRun) -> list[Backend]:
    """Returns the trackers that a config asks for, not yet started."""
    found: list[Backend] = []
    if track.tensorboard:
        found.append(TensorBoardBackend(what))
    if track.mlflow is not None:
        found.append(MlflowBackend(track.mlflow, what))
    if track.trackio is not None:
        found.append(TrackioBackend(track.trackio, what))
    return found


def _as_code(content: Mapping[str, Any]) -> str:
    """A mapping as a block of Markdown's."""
    plain = {name: value for name, value in content.items() if name != "model"}
    text = json.dumps(plain, indent=2) + (f"\n\n{content['model']}" if isinstance(content.get("model"), str) else "")
    return "\n".join(f"    {line}" for line in text.splitlines())


def _markdown(rows: tuple[Mapping[str, Any], ...]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)
