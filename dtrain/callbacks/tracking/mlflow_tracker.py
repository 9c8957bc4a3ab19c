"""MLflow, by its own client: no state of the process's, so nothing is waited for at its exit."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dtrain.callbacks.tracking.about import as_parameters
from dtrain.callbacks.tracking.base import RunEnd, TrackedRun
from dtrain.callbacks.tracking.files import read_json, write_json
from dtrain.callbacks.tracking.media_notes import MediaNotes
from dtrain.callbacks.tracking.wandb_worker import alone
from dtrain.config.schema import MlflowConfig
from dtrain.layout import HISTORY, MEDIA, TRACKING
from dtrain.rundir.columns import EPOCH, OWN
from dtrain.rundir.media import Entry, folder_of

STATE = "mlflow.json"
LOCK = "mlflow.lock"
_LOCAL = ("", "file", "sqlite", "mysql", "postgresql", "mssql")  # stores that are no server of MLflow's
# Where nobody has set them: by default a call to a server that is away is tried for a minute.
_CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}
_MOST_PARAMETERS, _LONGEST_PARAMETER = 100, 500  # of one call; characters
# What tells that a row is there, and of what step: a value that nobody else logs. Then a value of each moment.
_ROW, _MOMENT = f"{OWN}{EPOCH}", "step/samples_per_second"


class MlflowBackend:
    """MLflow: metrics, the config as parameters, and the history as a table among the artifacts.

    Args:
        options: the config's.
        what: what it is told of once.
    """

    name = "mlflow"

    def __init__(self, options: MlflowConfig, what: TrackedRun) -> None:
        self._options, self._what = options, what
        self._id = what.ids.get(self.name, "")
        self._held = contextlib.ExitStack()
        self._is_alone = False
        self._notes: MediaNotes | None = None

    def load(self) -> bool:
        """Loads the library; returns whether a server is asked."""
        for name, value in _CLIENT.items():
            os.environ.setdefault(name, value)
        import mlflow

        self._uri = self._options.uri or mlflow.get_tracking_uri()
        write_json(self._what.folder / TRACKING / STATE, {})
        return urlsplit(str(self._uri)).scheme.partition("+")[0] not in _LOCAL

    def start(self) -> str:
        """Starts a run, or resumes it."""
        from mlflow import MlflowClient

        self._is_alone = self._is_alone or self._held.enter_context(alone(self._what.folder, name=LOCK))
        if not self._is_alone:
            raise RuntimeError("another process is sending this run")
        self._client = MlflowClient(self._uri)
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        # Else MLflow would find out the user's name and the command's path.
        tags = {"mlflow.user": "", "mlflow.source.name": "dtrain", "mlflow.source.type": "LOCAL"}
        commit = self._what.about.get("code")
        tags |= {"mlflow.source.git.commit": commit} if commit else {}
        run = self._client.create_run(self._experiment(), tags=tags, run_name=self._what.folder.name)
        self._id = str(run.info.run_id)
        return self._id

    def last_epoch(self) -> int:
        """Returns the last epoch that the server has, once it has what is said once."""
        if not self._client.get_run(self._id).data.params:
            self._describe()
        found = self._last(_ROW)
        if found:
            return found
        # Earlier versions had no such mark. Others may have logged an epoch, at an optimizer step.
        history = self._client.get_metric_history(self._id, EPOCH)
        return max((int(metric.step) for metric in history if metric.value == metric.step), default=0)

    def last_moment(self) -> int:
        """Returns the optimizer step of the last values within an epoch that the server has, 0 for none."""
        return self._last(_MOMENT)

    def log(self, values: Mapping[str, Any], step: int, at: float = 0.0) -> None:
        """Logs metrics in one call; their step is the epoch, or the number of optimizer steps.

        Args:
            values: by name; what is no number is left out.
            step: the epoch or optimizer step.
            at: when they came, in seconds since the epoch; 0 for now.
        """
        from mlflow.entities import Metric

        when = round(1000 * (at or time.time()))
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if EPOCH in numbers:
            numbers[_ROW] = numbers[EPOCH]  # the last one, where a store takes one after the other
        self._client.log_batch(self._id, [Metric(name, float(value), when, step) for name, value in numbers.items()])

    def log_media(self, entry: Entry, folder: Path) -> None:
        """Adds an image, a text or a file to the artifacts, below media/; a histogram as JSON."""
        notes = self._notes = self._notes or MediaNotes(self._what.folder, self.name)
        if entry in notes:
            return
        place = f"{MEDIA}/{folder_of(entry.name)}"
        if entry.kind == "histogram":
            content = json.dumps({"counts": list(entry.counts), "edges": list(entry.edges)})
            self._client.log_text(self._id, content, f"{place}/step-{entry.step:08d}.json")
        elif (folder / entry.file).is_file():  # else somebody has deleted it
            self._client.log_artifact(self._id, str(folder / entry.file), place)
        notes.add(entry)

    def finish(self, end: RunEnd) -> None:
        """Adds the history and, where they are asked for, weights; tells how the run ended."""
        if end.rows:
            self._client.log_artifact(self._id, str(self._what.folder / HISTORY))
        if end.weights is not None:
            self._client.log_artifact(self._id, str(end.weights), "weights")
        self._client.set_terminated(self._id, "FAILED" if end.failed else "FINISHED" if end.complete else "KILLED")
        write_json(self._what.folder / TRACKING / STATE, {"rows": len(end.rows)})
        self._held.close()
        self._is_alone = False

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._options.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has just made it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _describe(self) -> None:
        from mlflow.entities import Param

        about = {f"about.{name}": value for name, value in self._what.about.items() if name != "model"}
        values = as_parameters({**self._what.config, **about})
        parameters = [Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in values.items()]
        self._client.log_text(self._id, str(self._what.about.get("model", "")), "model.txt")
        for begin in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[begin : begin + _MOST_PARAMETERS])

    def _last(self, name: str) -> int:
        return max((int(metric.step) for metric in self._client.get_metric_history(self._id, name)), default=0)


def without_password(uri: str) -> str:
    """Returns a server's address without the user and password in it."""
    scheme, there, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if there and "@" in rest else uri


def everything_sent(run: Path, rows: int) -> bool:
    """Whether MLflow has taken all of a run's history, and its end."""
    return bool(read_json(run / TRACKING / STATE).get("rows", -1) >= rows)
