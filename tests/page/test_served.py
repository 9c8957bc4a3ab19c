"""The served page: it shows new rows while training goes on, and answers nobody but this machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from helpers.browser import Browser
from helpers.commands import Dtrain
from helpers.pointing import ends
from helpers.running import Running, running, wait_for
from helpers.runs import cells, make_run, rows

from dtrain.rundir.history import History


@contextmanager
def served(folder: Path, *words: object) -> Iterator[tuple[Running, int, str]]:
    """The command, serving on a free port; its port and token are those of the address that it prints."""
    with running(folder, "report", *words, "--serve", "--port", 0) as run:
        wait_for(lambda: "ssh -L" in run.text or run.process.poll() is not None, "the address")
        found = re.search(r"^report: http://127\.0\.0\.1:(\d+)/(?:\?token=(\S+))? ", run.text)
        assert found is not None, run.text
        yield run, int(found[1]), found[2] or ""


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def values(browser: Browser, run: str) -> list[str]:
    return browser.texts(f'#runs tr[data-run="{run}"] > *')


def is_gone(error: str) -> bool:
    """Whether a request failed since the server ended: before it connected, or while it waited for the answer."""
    return any(f"ERR_{word}" in error for word in ("CONNECTION_REFUSED", "CONNECTION_RESET", "EMPTY_RESPONSE"))


def test_rows_and_runs_appear_while_training_goes_on(browser: Browser, tmp_path: Path, recipes: Path) -> None:
    (tmp_path / "runs").mkdir()
    with served(tmp_path) as (server, port, token):
        browser.open(f"http://127.0.0.1:{port}/?token={token}")
        assert browser.run("return location.href") == f"http://127.0.0.1:{port}/"
        assert browser.run("return document.cookie") == "", "no script may read it"
        assert browser.texts("#count") == ["0 runs"]
        folder = make_run(tmp_path / "runs/by-hand", config={"train": {"epochs": 9}})
        history = History(folder / "history.csv")
        browser.until("return document.querySelector('#runs tr[data-run=by-hand]')")
        for row in rows(4):
            history.append(row)
            browser.until(
                "return document.querySelector('#runs tr[data-run=by-hand]').children[2].textContent === arguments[0]",
                f"{row['epoch']}/9",
            )
        last = cells(folder)[-1]["val_loss"]
        assert values(browser, "by-hand")[4] == f"{float(last):.5g}"
        work = tmp_path / "work"
        work.mkdir()
        words = ["train", recipes / "long.py", "--cpu", "epochs=3", "run.name=real", "model.pause=0.005"]
        with running(work, *words, f"run.dir={tmp_path}/runs", SLOW="0.3") as run:
            browser.until("return document.querySelector('#runs tr[data-run=real] .running')", seconds=120)
            (work / "go").touch()  # it has been seen, and need be slow no longer
            assert run.end() == 0, run.text
        browser.until("return document.querySelector('#runs tr[data-run=real] .complete')")
        browser.until("return document.querySelector('#runs tr[data-run=real]').children[2].textContent === '3/3'")
        assert values(browser, "real")[4] == f"{float(cells(tmp_path / 'runs/real')[-1]['val_loss']):.5g}"
        assert browser.texts("#timeline [data-run=real] .words") == ["1 start: complete"]
        shutil.rmtree(folder)
        browser.until("return !document.querySelector('#runs tr[data-run=by-hand]')")
        assert {url.partition("?")[0] for url in browser.requests()} == {
            f"http://127.0.0.1:{port}/{name}" for name in ("", "data.json")
        }
        assert [url for url in browser.requests() if token in url] == [], "asked for before, and never again"
        server.send(signal.SIGINT)
        assert server.end() == 0
        assert server.text.splitlines()[-1] == "ended."
        browser.until("return document.getElementById('live').textContent.includes('does not answer')")
        assert all(is_gone(error) for error in browser.errors()), browser.errors()
        with running(tmp_path, "report", "--serve", "--port", port):  # which has another token
            browser.until(
                "return document.getElementById('live').textContent.includes('open the address that it printed')"
            )
        assert all("403" in error or is_gone(error) for error in browser.errors()), browser.errors()


def test_what_a_person_is_doing_is_not_undone_by_a_new_row(browser: Browser, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        make_run(tmp_path / "runs" / name, rows(20, len(name)))
    history = History.resumed(tmp_path / "runs/two/history.csv", rows(20, 3))
    with served(tmp_path, "one", "two", "three") as (_, port, token):
        browser.open(f"http://localhost:{port}/?token={token}")
        browser.one('#run-chips [data-name="one"]').click()
        browser.one("#filter").send_keys("t")
        browser.all("#runs thead button")[0].click()
        browser.one("#zoom-in").click()
        before = ends(browser, "loss")
        assert 1 < before[0] < before[1] < 20
        history.append(rows(21, 3)[-1])
        browser.until("return document.querySelector('#runs tr[data-run=two]').children[2].textContent === '21'")
        assert browser.texts("#runs tbody th") == ["three", "two"]
        assert browser.run("return document.activeElement.id") == "zoom-in"
        assert browser.one('#run-chips [data-name="one"]').get_attribute("aria-pressed") == "false"
        assert ends(browser, "loss") == before, "what is zoomed in stays"


def test_it_answers_for_two_addresses_and_to_this_machine_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs/one", rows(3))
    with served(tmp_path, "--no-token") as (_, port, token):
        assert token == ""
        status, headers, body = ask(port, "/data.json")
        assert status == 200
        assert json.loads(body)["runs"][0]["cells"]["loss"] == [row["loss"] for row in cells(folder)]
        tag = headers["ETag"]
        assert ask(port, "/data.json", If_None_Match=tag)[::2] == (304, b"")
        History.resumed(folder / "history.csv", rows(3)).append(rows(4)[-1])
        # After a look that took long, on a busy machine, the server rests.
        wait_for(lambda: ask(port, "/data.json", If_None_Match=tag)[0] == 200, "the new row")
        status, headers, body = ask(port, "/data.json", If_None_Match=tag)
        assert (status, headers["ETag"] != tag, len(json.loads(body)["runs"][0]["epochs"])) == (200, True, 4)
        make_run(tmp_path / "runs/two", rows(2))
        tag = headers["ETag"].strip('"')
        wait_for(lambda: ask(port, "/data.json", If_None_Match=f'"{tag}"')[0] == 200, "the new run")
        fresh = json.loads(ask(port, f"/data.json?since={tag}")[2])
        assert [run if isinstance(run, str) else run["name"] + "!" for run in fresh["runs"]] == ["two!", "one"]
        assert ask(port, f"/data.json?since={fresh['tag']}", If_None_Match=f'"{fresh["tag"]}"')[0] == 304
        for unknown in ("", "0" * 32):
            assert all("cells" in run for run in json.loads(ask(port, f"/data.json?since={unknown}")[2])["runs"])
        status, headers, body = ask(port)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        assert ask(port, "/", "HEAD")[::2] == (200, b"")
        for path in ("/runs/", "/runs/one/history.csv", "/../../etc/passwd", "/index.html", "/data.json/"):
            assert ask(port, path)[0] == 404, path
        assert ask(port, "/", "POST")[0] == 501
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "",
            "localhost@evil",
            f"[::1]:{port}",
        ):
            for path in ("/", "/data.json"):
                status, _, body = ask(port, path, Host=host)
                assert (status, b"loss" in body) == (403, False), host
        for host in ("localhost", f"localhost:{port}", "127.0.0.1:4711", "LOCALHOST"):
            assert ask(port, "/data.json", Host=host)[0] == 200, host
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), 5):
            pass


def test_a_busy_port_is_one_message_that_names_it(dtrain: Dtrain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = dtrain("report", "--serve", "--port", port)
    assert (done.code, done.out) == (2, "")
    assert f"port {port} is in use by process" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_browser_that_goes_leaves_no_traceback(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/one", rows(2000))
    with served(tmp_path) as (run, port, token):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as rude:
                rude.sendall(f"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
                rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # its end is a reset
        assert ask(port, Authorization=f"Bearer {token}")[0] == 200
        with contextlib.ExitStack() as silent:
            for _ in range(400):  # more than the server keeps waiting; the oldest are closed
                silent.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(b"GET / HTTP/1.1\r\nHo")
            assert ask(port, Authorization=f"Bearer {token}")[0] == 200
            assert psutil.Process(run.process.pid).num_threads() < 300
        with contextlib.ExitStack() as strangers:
            for _ in range(60):  # who ask much and read nothing, which would keep a thread at an answer
                stranger = strangers.enter_context(socket.socket())
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                stranger.settimeout(0.2)
                with contextlib.suppress(OSError):
                    stranger.connect(("127.0.0.1", port))
                    stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000)
            wait_for(
                lambda: psutil.Process(run.process.pid).num_threads() < 30, "the end of the strangers' threads", 20
            )
            assert ask(port, Authorization=f"Bearer {token}")[0] == 200
        assert "Traceback" not in run.text


def test_only_the_token_of_the_printed_address_opens_it(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/secret", rows(3))
    with served(tmp_path) as (run, port, token):
        assert len(token) >= 32
        wrong = [token[:-1], token + "x", "", "\u00e9", "%00"]
        for path in ("/", "/data.json", "/data.json?since=x", "/nothing"):
            for given in (path, *(f"{path}{'&' if '?' in path else '?'}token={quote(word)}" for word in wrong)):
                status, headers, body = ask(port, given)
                assert (status, b"secret" in body, "Set-Cookie" in headers) == (403, False, False), given
                assert b"address printed by the command" in body
                assert b"--no-token" in body
        for name, value in (
            ("Cookie", f"dtrain-report-{port}={token}"),
            ("Cookie", f"dtrain-report-{port}="),
            ("Authorization", f"Bearer {token}x"),
            ("Authorization", token),
            ("Authorization", f"Basic {token}"),
        ):
            assert ask(port, "/data.json", **{name: value})[0] == 403, (name, value)
        status, headers, body = ask(port, f"/?token={token}")
        assert (status, headers["Location"], body) == (303, "/", b"")
        assert headers["Referrer-Policy"] == "no-referrer"
        cookie, *attributes = headers["Set-Cookie"].split("; ")
        assert attributes == ["HttpOnly", "SameSite=Lax", "Path=/"]
        assert token not in cookie
        for path in ("/", "/data.json"):
            assert ask(port, path, Cookie=f"other=1; {cookie}; another")[0] == 200
            assert ask(port, path, Cookie=cookie, Host="evil.example")[0] == 403
        for elsewhere in ("//evil.example/", "/\\evil.example/", "/data.json"):
            assert ask(port, f"{elsewhere}?token={token}&since=1")[1]["Location"] == "/", elsewhere
        assert ask(port, f"/?token={token}", Host="evil.example")[1].get("Set-Cookie") is None
        with socket.create_connection(("127.0.0.1", port), 30) as raw:
            raw.sendall(b"GET http://[/?token=x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert raw.recv(15).startswith(b"HTTP/1.1 403")
        for odd in ("/?" + "&" * 5000, "/?token=%ff%00", "*", "?", "/?token"):
            assert ask(port, odd)[0] == 403, odd
        assert "Traceback" not in run.text
        assert run.text.count(token) == 1, "in the address, and in no log"
