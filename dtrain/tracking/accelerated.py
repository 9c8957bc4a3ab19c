"""TensorBoard, MLflow and trackio, by way of Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.config.schema import MlflowConfig, TrackConfig, TrackioConfig
from dtrain.history import FILE_NAME
from dtrain.tracking.about import as_parameters
from dtrain.tracking.base import End
from dtrain.tracking.threaded import Backend

TENSORBOARD = "tensorboard"  # folder of its events, in the run's


@dataclass(frozen=True)
class What:
    """What a tracker is told of once.

    Attributes:
        folder: the run's folder.
        config: the resolved config.
        about: what `dtrain.tracking.about.about_run` returned.
        ids: tracker's name -> its id of the run that is gone on with; it is not there for a new one.
        updates: optimizer steps of the run so far.
        epochs: epochs of the run so far.
    """

    folder: Path
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    ids: Mapping[str, str] = field(default_factory=dict)
    updates: int = 0
    epochs: int = 0


class TensorBoardBackend:
    """TensorBoard's event files, in `tensorboard/` of the run's folder; the scalars in double precision.

    What a killed run wrote after the checkpoint that it goes on from is hidden by TensorBoard's own `purge_step`:
    it has one for all scalars, so those of moments and of epochs have a folder each.
    """

    name = "tensorboard"

    def __init__(self, what: What) -> None:
        self._what = what

    def start(self) -> str:
        """Opens two event files."""
        from accelerate.tracking import TensorBoardTracker

        folder = self._what.folder / TENSORBOARD
        # Always, since TensorBoard takes only the second one of a folder for a restart.
        purge = {"epochs": self._what.epochs + 1, "steps": self._what.updates + 1}
        self._writers = {part: TensorBoardTracker(part, folder, purge_step=step) for part, step in purge.items()}
        for writer in self._writers.values():
            writer.start()
        texts = {"config": _as_code(self._what.config), "about": _as_code(self._what.about)}
        self._writers["epochs"].log(texts, step=0)
        return TENSORBOARD

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Writes scalars; their step is the epoch, or the number of optimizer steps."""
        part = "epochs" if "epoch" in values else "steps"
        numbers = {name: value for name, value in values.items() if value is not None}
        # Its other form has 32 bits, and is not what the history says.
        self._writers[part].log(numbers, step=step, new_style=True, double_precision=True)

    def finish(self, end: End) -> None:
        """Writes the history as a table."""
        if end.complete and end.rows:
            self._writers["epochs"].log({"history": _markdown(end.rows)}, step=len(end.rows))
        for writer in self._writers.values():
            writer.finish()


class MlflowBackend:
    """MLflow: metrics, the config as parameters, and the history as a table among the artifacts."""

    name = "mlflow"

    def __init__(self, options: MlflowConfig, what: What) -> None:
        self._options, self._what = options, what

    def start(self) -> str:
        """Starts a run, or goes on with it."""
        import mlflow
        from accelerate.tracking import MLflowTracker

        if self._options.uri is not None:
            mlflow.set_tracking_uri(self._options.uri)
        mlflow.set_experiment(self._options.experiment)  # Accelerate would give a new one this run's tags
        # Else it finds out the user's name and the command's path.
        tags = {"mlflow.user": "", "mlflow.source.name": "dtrain", "mlflow.source.type": "LOCAL"}
        commit = self._what.about.get("code")
        tags |= {"mlflow.source.git.commit": commit} if commit else {}
        resumed = self._what.ids.get(self.name)
        self._tracker = MLflowTracker(
            self._options.experiment,
            run_id=resumed,
            run_name=self._what.folder.name,
            tags=tags,
        )
        self._tracker.start()
        if resumed is None:  # parameters are set once
            about = {f"about.{name}": value for name, value in self._what.about.items() if name != "model"}
            self._tracker.store_init_configuration(as_parameters({**self._what.config, **about}))
            mlflow.log_text(self._what.about["model"], "model.txt")
        return str(self._tracker.tracker.info.run_id)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs metrics; their step is the epoch, or the number of optimizer steps."""
        self._tracker.log({name: value for name, value in values.items() if value is not None}, step=step)

    def finish(self, end: End) -> None:
        """Adds the history and, where they are asked for, weights; tells how the run ended."""
        import mlflow

        if end.rows:  # MLflow's own log_table would append to that of a run that is gone on with
            mlflow.log_artifact(str(self._what.folder / FILE_NAME))
        if end.weights is not None:
            self._tracker.log_artifact(str(end.weights), "weights")
        mlflow.end_run("FAILED" if end.failed else "FINISHED" if end.complete else "KILLED")


class TrackioBackend:
    """trackio: its run has the name of the dtrain run."""

    name = "trackio"

    def __init__(self, options: TrackioConfig, what: What) -> None:
        self._options, self._what = options, what

    def start(self) -> str:
        """Starts a run, or goes on with it."""
        from accelerate.tracking import TrackioTracker

        before = self._what.ids.get(self.name)
        name = before or self._what.folder.name
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

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs values; their step is the epoch, or the number of optimizer steps."""
        self._tracker.log({name: value for name, value in values.items() if value is not None}, step=step)

    def finish(self, end: End) -> None:
        """Ends the run; the history is in its metrics."""
        self._tracker.finish()


def backends(track: TrackConfig, what: What) -> list[Backend]:
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
