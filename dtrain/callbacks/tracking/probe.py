"""What a W&B server is asked besides what W&B's own client asks: whether it can be used, and how far a run is."""

from __future__ import annotations

import json
import threading
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 4.0  # seconds
# As W&B's own client asks, before it goes on with a run.
_HOW_FAR = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) { historyLineCount historyTail } }
}"""
_QUERY: dict[str, Any] = {"query": "query Viewer { viewer { id username entity } }", "variables": {}}


def what_is_wrong(url: str, key: str | None, patience: float = PATIENCE) -> str:
    """Returns why a server cannot be used, in words that name it; "" where it can.

    Args:
        url: the server's.
        key: the API key; None where the log-in is another one, which the server is not asked about.
        patience: seconds, for all of it: also for a name server, or an answer that comes drop by drop.
    """
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_ask(url, key, patience)), daemon=True)
    thread.start()
    thread.join(patience)
    return found[0] if found else f"{url} did not answer within {patience:g} s"


def last_step(url: str, key: str | None, *, entity: str, project: str, run_id: str) -> int | None:
    """Returns the step of the last values that a server has of a run: -1 for none; None where it does not tell."""
    import requests

    body: dict[str, Any] = {"query": _HOW_FAR, "variables": {"project": project, "entity": entity, "name": run_id}}
    try:
        answer = requests.post(
            f"{url.rstrip('/')}/graphql", json=body, auth=("api", key) if key else None, timeout=PATIENCE
        )
        bucket = answer.json()["data"]["model"]["bucket"]
        lines = json.loads(bucket["historyTail"] or "[]")
        return int(json.loads(lines[-1])["_step"]) if lines else -1
    except (requests.RequestException, ValueError, LookupError, TypeError):
        return None


def no_key(url: str) -> str:
    """Returns the words for a server that nobody is logged in to."""
    return f"there is no API key for {urlsplit(url).netloc}: run `wandb login`, or set WANDB_API_KEY"


def _ask(url: str, key: str | None, patience: float) -> str:
    import requests

    try:
        answer = requests.post(
            f"{url.rstrip('/')}/graphql", json=_QUERY, auth=("api", key) if key else None, timeout=patience
        )
    except requests.Timeout:
        return f"{url} did not answer within {patience:g} s"
    except requests.RequestException as error:
        return f"{url} cannot be reached: {_reason(error)}"
    return _judge(url, answer, with_key=bool(key))


def _judge(url: str, answer: Any, *, with_key: bool) -> str:
    if not answer.ok and answer.status_code not in (401, 403):
        return f"{url} answers {answer.status_code}"
    try:
        refused = not answer.ok or (with_key and answer.json()["data"]["viewer"] is None)
    except (ValueError, LookupError, TypeError):
        return f"{url} is not a W&B server"
    if refused:
        return f"{url} rejects the API key ({answer.status_code}): run `wandb login --relogin`, or set WANDB_API_KEY"
    return ""


def _reason(error: BaseException) -> str:
    """The innermost reason, such as "Connection refused"; the outer ones repeat the address."""
    seen = [error]
    while True:
        inner = seen[-1].__cause__ or seen[-1].__context__ or getattr(seen[-1], "reason", None)
        if not isinstance(inner, BaseException) or inner in seen:
            break
        seen.append(inner)
    for one in reversed(seen):
        words = getattr(one, "strerror", None)
        if words:
            return str(words)
    return type(seen[-1]).__name__
