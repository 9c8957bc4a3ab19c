"""What a W&B server is asked besides, and what is made of its answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from helpers.wandb_server import KEY, WandbServer

from dtrain.callbacks.tracking.probe import last_step, no_key, what_is_wrong


@pytest.fixture
def server() -> Iterator[WandbServer]:
    found = WandbServer()
    yield found
    found.close()


def test_a_server_that_is_well_is_used(server: WandbServer) -> None:
    assert what_is_wrong(server.url, KEY, 20) == ""


def test_what_is_wrong_with_a_server_is_said(server: WandbServer) -> None:
    url = server.url
    assert what_is_wrong(url, "another key" * 4, 20) == (
        f"{url} rejects the API key (401): run `wandb login --relogin`, or set WANDB_API_KEY"
    )
    server.status = 500
    assert what_is_wrong(url, KEY, 20) == f"{url} answers 500"
    server.status = 200
    server.hangs.set()
    assert what_is_wrong(url, KEY, 0.3) == f"{url} did not answer within 0.3 s"
    server.vanish()
    assert what_is_wrong(url, KEY, 20) == f"{url} cannot be reached: Connection refused"
    assert no_key(url) == f"there is no API key for {url[7:]}: run `wandb login`, or set WANDB_API_KEY"


def test_a_server_that_answers_drop_by_drop_has_no_more_time_than_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                while not stop.wait(0.05):
                    connection.sendall(b"H")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        assert what_is_wrong(url, KEY, 0.5) == f"{url} did not answer within 0.5 s"
        assert time.monotonic() - began < 20
        stop.set()
        thread.join(60)


def test_a_server_is_asked_how_far_a_run_is(server: WandbServer) -> None:
    def ask() -> int | None:
        return last_step(server.url, KEY, entity="me", project="p", run_id="r")

    assert ask() is None  # no such run
    server.graphql({"query": "mutation UpsertBucket", "variables": {"name": "r"}})
    assert ask() == -1
    server.stream("r", {"files": {"wandb-history.jsonl": {"offset": 0, "content": [json.dumps({"_step": 41})]}}})
    assert ask() == 41
    server.status = 500
    assert ask() is None
