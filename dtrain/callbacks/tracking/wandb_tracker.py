"""The training's side of W&B: it starts the process that sends, and tells a person how that one fares."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.files import shown
from dtrain.files import open_below
from dtrain.launch.signals.stop_request import kept_for_later
from dtrain.launch.terminal.guarded import put
from dtrain.layout import TRACKING

logger = logging.getLogger(__name__)

LOG = "wandb.log"
# Not by -m, with which Python looks for each module in the present folder first: a requests.py there would be taken.
_WORKER = (
    "import sys; sys.path[:1] = filter(None, sys.path[:1]); "
    "from dtrain.callbacks.tracking.wandb_worker import main; main()"
)
_START_SECONDS = 30.0  # for Python and W&B to load, and to write what needs no network
_ANNOUNCE_SECONDS = 1.0
_GRACE_SECONDS = 1.0

# What W&B's client may see of the environment: where it lives, how the network is reached, its own settings.
_NAMES = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "TEMP", "TMP", "NETRC", "PYTHONPATH",
    "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "SYSTEMROOT", "CUDA_VISIBLE_DEVICES",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
_PREFIXES = ("WANDB_", "LC_", "XDG_")
# Set for a run by the config, not by chance.
_NOT = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_DIR",
        "WANDB_SERVICE", "WANDB_NOTES", "WANDB_CONFIG_PATHS", "WANDB_SWEEP_ID", "WANDB_DISABLED")  # fmt: skip


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the part of an environment that W&B's client gets: nothing of it can end up in what is sent."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name.startswith(_PREFIXES) or name.lower().endswith("_proxy")) and name not in _NOT
    }
    return {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", **kept}


class WandbTracker:
    """Weights & Biases, which never harms the run: all that may wait or fail does so in a process of its own.

    The values get there by way of the run's folder. Nothing of W&B's is loaded here.

    Args:
        run: the run's folder; `tracking/about.json` is there.
        run_id: of W&B's run.
        patience: seconds that the end of the training waits for the server.
    """

    name = "wandb"

    def __init__(self, run: Path, run_id: str, patience: float) -> None:
        self._folder, self._id, self._patience = run, run_id, patience
        self._remedy = f"dtrain sync {shlex.quote(str(shown(run)))}"  # now: a step may change the present folder
        self._read = b""
        self._state: dict[str, Any] = {}
        self._up = self._over = False
        self._began = time.monotonic()
        descriptor = open_below(run, f"{TRACKING}/{LOG}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with kept_for_later(), os.fdopen(descriptor, "ab") as log:  # for ever: it ends as the training does
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(run.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(os.environ),
                start_new_session=True,
                bufsize=0,
            )
        self._out: int = self._process.stdout.fileno()  # type: ignore[union-attr]
        self._poll = select.poll()  # select() takes none of the files of a process that has opened a thousand
        self._poll.register(self._out, select.POLLIN | select.POLLHUP)

    def run_id(self) -> str:
        """Returns W&B's id of the run."""
        return self._id

    def log_steps(self, values: Mapping[str, float], step: int) -> None:
        """Looks whether there is something to tell; the values are in the run's folder."""
        self._hear(0)

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Looks whether there is something to tell; the row is in the run's folder."""
        self._hear(0)

    def finish(self, end: RunEnd) -> None:
        """Waits until all is sent, as long as was said at most; what is not is kept."""
        word = {
            "failed": end.failed,
            "complete": end.complete,
            "artifact": None if end.weights is None else str(end.weights.resolve()),
        }
        with contextlib.suppress(OSError):
            self._process.stdin.write((json.dumps(word) + "\n").encode())  # type: ignore[union-attr]
        asked = time.monotonic()
        announced = False
        while not self._over and time.monotonic() < self._until(asked):
            self._hear(0.1)
            if not announced and "online" in self._state and time.monotonic() - asked > _ANNOUNCE_SECONDS:
                announced = True
                put(f"W&B: sending the last values, for {self._patience:g} s at most\n", sys.stdout)
        self._sum_up()
        self._close()

    def _until(self, asked: float) -> float:
        if not self._up:
            return max(asked, self._began + _START_SECONDS)
        # What is written here, and not sent, takes no longer than this machine needs for it.
        patience = max(self._patience, _START_SECONDS) if "offline" in self._state else self._patience
        return max(asked, self._since) + patience + _GRACE_SECONDS

    def _hear(self, seconds: float) -> None:
        """Takes what the other process has told, and tells a person what matters."""
        self._process.poll()  # it has detached itself, and what it detached from is not to stay as a zombie
        while not self._over and self._poll.poll(1000 * seconds):
            data = os.read(self._out, 65536)
            if not data:
                self._over = True
                break
            *lines, self._read = (self._read + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, word: dict[str, Any]) -> None:
        event, why = word["event"], word.get("why", "")
        if event == "up":
            self._up, self._since = True, time.monotonic()
        elif event == "online":
            put(f"W&B: {word['url']}\n", sys.stdout)
        elif event == "offline" and why:
            logger.warning("W&B: offline: %s. All values are kept; send them later with: %s", why, self._remedy)
        elif event == "failed":
            logger.warning("W&B: not tracked: %s. All values are kept; send them later with: %s", why, self._remedy)
        self._state[event] = word

    def _sum_up(self) -> None:
        """One line where the server was there and did not get all; the others were told before."""
        done = self._state.get("done")
        if "failed" in self._state or (done is not None and (done["sent"] or not done["why"])):
            return
        ended = f"its process ended, see {self._folder / TRACKING / LOG}" if self._over else "it did not finish in time"
        why = ended if done is None else done["why"]
        logger.warning(
            "W&B: not everything was sent: %s. All values are kept; send them later with: %s", why, self._remedy
        )

    def _close(self) -> None:
        """Ends the other process, where it has not ended itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if not self._over:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
