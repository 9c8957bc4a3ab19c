"""One run of W&B's, filled from a run's folder; for the process beside the training, and for `dtrain sync`."""

from __future__ import annotations

import html
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dtrain.callbacks.tracking.files import ABOUT, read_json, write_json
from dtrain.callbacks.tracking.media_notes import MediaNotes
from dtrain.callbacks.tracking.probe import PATIENCE, last_step, no_key, what_is_wrong
from dtrain.callbacks.tracking.values import Entry, Values
from dtrain.layout import MEDIA, TRACKING
from dtrain.rundir.media import Entry as MediaEntry

STATE = "wandb.json"
_INIT_SECONDS = 20.0
_SETTLE_SECONDS = 3.0  # for a server to show what it has taken


class NotSentError(Exception):
    """Values did not get to the server; the message says why."""


def _login() -> tuple[str, str | None]:
    """Returns the server's address, and the API key for it, where there is one."""
    import requests
    import wandb

    settings = wandb.setup().settings
    url, key = str(settings.base_url), settings.api_key
    if not key:
        found = requests.utils.get_netrc_auth(url)
        key = found[1] if found else None
    return url, key


def server(patience: float = PATIENCE) -> tuple[str, str]:
    """Returns the server's address, and why it cannot be used, "" where it can. Asks nobody at a terminal.

    Args:
        patience: seconds that it has to answer.
    """
    import wandb

    url, key = _login()
    if not key and not wandb.setup().settings.identity_token_file:
        return url, no_key(url)
    return url, what_is_wrong(url, key, patience)


class WandbRun:
    """W&B's run of a run: its id is the same in each process that goes on with it.

    What is told of it is the run's config, what `about.json` says besides, and values; neither the environment nor
    the command line, host or user.

    Args:
        run: the run's folder.
        online: whether it is sent to the server at once; else it is kept in the folder, in W&B's own format.
        patience: seconds to wait for the server at the end.
        watched: process whose use of the machine W&B shall show; None for none.
        keep_in: where W&B's own files go, by default the run's folder.

    Raises:
        NotSentError: the server does not take it.
    """

    def __init__(
        self, run: Path, *, online: bool, patience: float, watched: int | None = None, keep_in: Path | None = None
    ) -> None:
        import wandb

        self.folder = run
        self._patience = patience
        about = read_json(run / TRACKING / ABOUT)
        options = about["wandb"]
        self._online = online
        self._state = read_json(run / TRACKING / STATE)
        wanted = {
            "program": "dtrain",
            "x_disable_meta": True,  # host, user, command line
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "disable_git": True,
            "disable_code": True,
            "console": "off",
            "silent": True,
            "x_disable_stats": watched is None,
            **({} if watched is None else {"x_stats_pid": watched}),
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": patience,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1.0,
        }
        known = wandb.Settings.model_fields  # others are of another version of W&B
        try:
            self._run = wandb.init(
                project=options["project"],
                entity=options["entity"],
                mode="online" if online else "offline",
                id=options["id"],
                name=about["name"],
                resume="allow",
                dir=str(keep_in or run),
                config={**about["config"], "about": about["about"]},
                allow_val_change=True,
                settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
            )
        except Exception as error:
            raise NotSentError(_first_line(error)) from error
        self._run.define_metric("epoch", hidden=True)
        self._columns: set[str] = {"epoch"}
        self._step = -1  # of the last values
        self._at = time.time()  # and their time
        # What the server has, or what lies in the folder from before, is not sent twice.
        self._first = self._run.starting_step if online else self._state.get("written", -1) + 1
        self._media = MediaNotes(run, "wandb" if online else "wandb-offline")
        self._sent = set[MediaEntry]()  # here, and
        self._at_step: dict[str, int] = {}  # at which step of W&B's, by name
        self._epoch = self._run.summary.get("epoch", 0) if online else self._state.get("epoch", math.inf)

    @property
    def url(self) -> str:
        """Where it is to be seen."""
        return str(self._run.url or "")

    def send(self, entries: Iterable[Entry], media: Iterable[MediaEntry] = ()) -> None:
        """Logs values, each at its own time, and media between them; those that W&B has are left out.

        A row may be new at a step that is not: values of that step came before a run was stopped, and its epoch's end
        after it was resumed. W&B takes nothing at a step that it has, so that such a row gets the next one, as
        media do.

        Args:
            entries: the values.
            media: images, histograms and texts, which are logged; and files, which are kept with W&B's run.
        """
        waiting = deque(sorted((one for one in media if not self._has(one)), key=lambda one: one.step))
        for entry in entries:
            while waiting and waiting[0].step < entry.step:
                self._send_media(waiting.popleft())
            self._send_values(entry)
        for one in waiting:
            self._send_media(one)

    def _send_values(self, entry: Entry) -> None:
        if entry.step < self._first and not (entry.is_row and entry.values["epoch"] > self._epoch):
            return
        self._step = max(self._step, entry.step, self._first)
        values = dict(entry.values)
        if entry.is_row:
            for name in values.keys() - self._columns:
                self._run.define_metric(name, step_metric="epoch")
            self._columns |= values.keys()
        if entry.at:
            values["_timestamp"] = self._at = entry.at
        self._run.log(values, step=self._step)

    def _has(self, entry: MediaEntry) -> bool:
        return entry in self._media and (entry.step < self._first or entry in self._sent)

    def _send_media(self, entry: MediaEntry) -> None:
        try:
            self._log_media(entry)
        except (OSError, ValueError) as error:  # a file that somebody has deleted ends no tracking of numbers
            print(f"{entry.kind} {entry.name!r} of step {entry.step} is not sent: {error}", file=sys.stderr)  # noqa: T201
        self._sent.add(entry)
        self._media.add(entry)

    def _log_media(self, entry: MediaEntry) -> None:
        import wandb

        file = self.folder / MEDIA / entry.file
        if entry.kind == "file":
            self._run.save(str(file), base_path=str(self.folder), policy="now")
            return
        # Of one name and step W&B keeps the last one.
        self._step = max(self._step, entry.step, self._first, self._at_step.get(entry.name, -1) + 1)
        self._at_step[entry.name] = self._step
        value: Any
        if entry.kind == "image":
            value = wandb.Image(str(file), file_type="png")
        elif entry.kind == "histogram":
            value = wandb.Histogram(np_histogram=(list(entry.counts), list(entry.edges)))
        else:
            text = html.escape(file.read_text(encoding="utf-8", errors="replace"))
            value = wandb.Html(f"<pre>{text}</pre>", inject=False)
        self._run.log({entry.name: value}, step=self._step)

    def finish(self, values: Values, end: Mapping[str, Any]) -> None:
        """Ends W&B's run, and notes what it has.

        Args:
            values: all of whose entries were logged.
            end: how the run ended: `failed`; `complete`, with which its history is added as a table; `artifact`, the
                path of weights to send along, or None. Empty where it was killed.

        Raises:
            NotSentError: the server did not take all of it in time.
        """
        self._note(values, end, sent=False)
        if self._online:
            self._wait_for_server(self._patience / 2 if end else 0.0)
        problems: list[Exception] = []
        try:
            if end.get("complete") and values.rows:
                self._run.log(
                    {"history": _table(values.rows), "_timestamp": self._at}, step=max(self._step, values.last)
                )
            if end.get("artifact"):
                self._log_artifact(Path(end["artifact"]))
        except Exception as error:  # noqa: BLE001 - it is told below; the values matter more
            problems.append(error)
        try:
            self._run.finish(exit_code=int(end.get("failed", True)))
        except Exception as error:  # noqa: BLE001 - it is told below
            problems.append(error)
        missing = "" if problems or not self._online else self._missing(max(self._step, values.last))
        self._note(values, end, sent=self._online and not problems and not missing)
        if missing:
            raise NotSentError(missing)
        if problems:
            late = isinstance(problems[-1], TimeoutError)
            words = "the server did not accept them in time" if late else _first_line(problems[-1])
            raise NotSentError(words) from problems[-1]

    def _wait_for_server(self, seconds: float) -> None:
        """What is sent at the end waits for a server that is gone for longer than anybody wants to wait.

        Raises:
            NotSentError: it is gone. What W&B's client holds back for it is in the run's folder.
        """
        until = time.monotonic() + seconds
        while True:
            _, why = server(max(1.0, min(PATIENCE, until - time.monotonic())))
            if not why:
                return
            if time.monotonic() > until - 1:
                raise NotSentError(why)
            time.sleep(0.5)

    def _missing(self, last: int) -> str:
        """Returns what the server lacks, "" where it has all: W&B's client may have given up on it, and not say so.

        A server that does not tell is believed to have all.
        """
        url, key = _login()
        until = time.monotonic() + min(self._patience / 2, _SETTLE_SECONDS)
        while True:
            step = last_step(url, key, entity=self._run.entity, project=self._run.project, run_id=self._run.id)
            if step is None or step >= last:
                return ""
            if time.monotonic() > until:
                return f"{url} has them up to optimizer step {max(step, 0)} of {last}"
            time.sleep(0.25)

    def _log_artifact(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.folder.name}-weights", "model", metadata={"checkpoint": path.parent.name})
        artifact.add_file(str(path), path.name)
        logged = self._run.log_artifact(artifact)
        if self._online:
            logged.wait(timeout=max(1, round(self._patience)))

    def _note(self, values: Values, end: Mapping[str, Any], *, sent: bool) -> None:
        epoch = values.rows[-1]["epoch"] if values.rows else 0
        now = {"written": max(self._step, values.last), "epoch": epoch, "end": dict(end)}
        if sent:
            now |= {"sent": values.last, "rows": len(values.rows)}
        write_json(self.folder / TRACKING / STATE, {**self._state, **now})


def _table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[_plain(row.get(name)) for name in columns] for row in rows])


def _plain(value: Any) -> Any:
    """A table's cell: W&B's tables have no infinite numbers."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def everything_sent(run: Path, values: Values) -> bool:
    """Whether the server has confirmed all of a run's values."""
    state = read_json(run / TRACKING / STATE)
    return bool(state.get("sent", -1) >= values.last and state.get("rows", 0) >= len(values.rows))


def noted_end(run: Path) -> dict[str, Any]:
    """Returns how a run ended, as far as that was noted; empty where it was killed."""
    found = read_json(run / TRACKING / STATE).get("end")
    return found if isinstance(found, dict) else {}
