"""What dtrain uses of MLflow's client, with a file in place of a server: FAKE_MLFLOW names its folder.

The server is away while a file `away` is in that folder, and hangs with what it gets of an epoch while `stuck` is.
"""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

from mlflow.exceptions import MlflowException

_FOLDER = Path(os.environ["FAKE_MLFLOW"])


def get_tracking_uri():
    return "http://fake.invalid"


class MlflowClient:
    def __init__(self, uri):
        assert uri == "http://fake.invalid"

    def _store(self):
        if (_FOLDER / "away").exists():
            raise MlflowException("API request failed: Connection refused")
        file = _FOLDER / "store.json"
        return json.loads(file.read_text()) if file.exists() else {"experiments": [], "runs": []}

    def _save(self, store):
        part = _FOLDER / f".store-{os.getpid()}"
        part.write_text(json.dumps(store))
        part.rename(_FOLDER / "store.json")

    def _change(self, run_id, change):
        store = self._store()
        change(store["runs"][int(run_id)])
        self._save(store)

    def get_experiment_by_name(self, name):
        found = name in self._store()["experiments"]
        return SimpleNamespace(experiment_id=name) if found else None

    def create_experiment(self, name):
        store = self._store()
        store["experiments"].append(name)
        self._save(store)
        return name

    def create_run(self, experiment_id, tags, run_name):
        store = self._store()
        run = {"name": run_name, "tags": tags, "params": {}, "metrics": [], "files": [], "status": "RUNNING"}
        store["runs"].append(run)
        self._save(store)
        return SimpleNamespace(info=SimpleNamespace(run_id=str(len(store["runs"]) - 1)))

    def update_run(self, run_id, status):
        self._change(run_id, lambda run: run.update(status=status))

    def get_run(self, run_id):
        return SimpleNamespace(data=SimpleNamespace(params=self._store()["runs"][int(run_id)]["params"]))

    def get_metric_history(self, run_id, name):
        metrics = self._store()["runs"][int(run_id)]["metrics"]
        return [SimpleNamespace(step=step, value=value) for found, value, step in metrics if found == name]

    def log_batch(self, run_id, metrics=(), params=()):
        while any(one.key == "epoch" for one in metrics) and (_FOLDER / "stuck").exists():
            time.sleep(0.02)

        def add(run):
            run["metrics"] += [[one.key, one.value, one.step] for one in metrics]
            run["params"] |= {one.key: one.value for one in params}

        self._change(run_id, add)

    def log_text(self, run_id, text, artifact_file):
        self._change(run_id, lambda run: run["files"].append(artifact_file))

    def log_artifact(self, run_id, local_path, artifact_path=""):
        self._store()
        shutil.copy(local_path, _FOLDER)
        self._change(run_id, lambda run: run["files"].append(f"{artifact_path}/{Path(local_path).name}".lstrip("/")))

    def set_terminated(self, run_id, status):
        self._change(run_id, lambda run: run.update(status=status))
