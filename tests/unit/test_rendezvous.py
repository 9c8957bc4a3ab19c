"""The launchers of two nodes meet, in this process, whatever strangers send meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from helpers.rendezvous import JSON, WORD
from helpers.sweep import FULL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.errors import WorldError
from dtrain.launch.env import ports
from dtrain.launch.env.job import BY_ARRIVAL, Job
from dtrain.launch.nodes.base import Rendezvous
from dtrain.launch.nodes.first_node import FirstNode
from dtrain.launch.nodes.messages import ExitMessage
from dtrain.launch.nodes.other_node import OtherNode
from dtrain.launch.nodes.secret import Secret

ABOUT = {
    "--rdzv and --job-id": "127.0.0.1:1 private-id",
    "--nodes": "2",
    "-n": "1",
    "dtrain's version": "9.8.7",
    "the command": "train r.py data.token=hush",
}


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def a_job(port: int, **more: Any) -> Job:
    return Job(
        ranks=1, nodes=2, host="127.0.0.1", rdzv_port=port, timeout=60, secret=Secret(b"s" * 32, "a test"), **more
    )


@contextlib.contextmanager
def waiting_host(
    secret: Secret | None = None,
) -> Iterator[tuple[FirstNode, int, threading.Thread, list[BaseException]]]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    job = a_job(port)
    host = FirstNode(job if secret is None else replace(job, secret=secret), ABOUT, listener)
    stop: list[int] = []
    thread, raised = in_thread(lambda: host.gather(stop))
    try:
        yield host, port, thread, raised
    finally:
        stop.append(15)
        thread.join(60)
        host.close()


def joined(port: int, about: dict[str, str] = ABOUT, **more: Any) -> OtherNode:
    follower = OtherNode(replace(a_job(port, node_rank=1), **more), about)
    try:
        follower.join([])
    except WorldError:
        follower.close()
        raise
    return follower


GARBAGE = st.one_of(
    st.binary(max_size=300),
    JSON.map(lambda one: json.dumps(one).encode() + b"\n"),
    st.fixed_dictionaries({"rdzv": st.sampled_from([2, 1, "2", 2.0]), "nonce": st.just("0" * 32) | JSON}).map(
        lambda one: json.dumps(one).encode() + b"\n"
    ),
)


class TestMeeting:
    def test_whatever_is_sent_the_job_starts_and_the_stranger_learns_nothing(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with waiting_host() as (host, port, thread, raised):

            @settings(max_examples=3000 if FULL else 120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
            @given(st.lists(GARBAGE, min_size=1, max_size=3), st.booleans())
            def attack(parts: list[bytes], ends: bool) -> None:
                place = ("127.0.0.1", port)
                with socket.create_connection(place, timeout=5) as caller, contextlib.suppress(OSError):
                    for part in parts:
                        caller.sendall(part)
                    if ends:
                        caller.shutdown(socket.SHUT_WR)
                        heard = caller.recv(10_000)
                        assert heard == b"" or set(json.loads(heard)) == {"nonce", "proof"}
                assert thread.is_alive(), raised

            attack()
            follower = joined(port)
            thread.join(60)
            assert (thread.is_alive(), raised) == (False, [])
            assert (follower.job.port, follower.job.nonce, follower.job.node_rank) == (host.job.port, host.job.nonce, 1)
            follower.tell(replace(WORD, text="of its own"))
            follower.tell(replace(WORD, node=0, text="for another"))
            assert heard_by(host) is not None
            for _ in range(20):  # the other one has come as well by then
                time.sleep(0.01)
                word = host.news()
            assert word is not None
            assert word.text == "of its own", "nobody speaks for another node"
            host.tell(replace(WORD, node=0))
            assert heard_by(follower) == replace(WORD, node=0)
            follower.close()
        warnings = capfd.readouterr().err.splitlines()
        assert len(warnings) <= 4, "one a kind"

    def test_after_the_start_a_guest_that_sends_nonsense_is_lost_and_the_host_is_not(self) -> None:
        with waiting_host() as (host, port, thread, _):
            follower = joined(port)
            thread.join(60)
            follower.wire.send({"ended": {"node": 1, "exit_code": "x"}})
            deadline = time.monotonic() + 60
            while (word := host.news()) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert word is not None
            assert word.lost
            assert "it sent an invalid message" in word.text
            follower.close()

    def test_without_the_secret_nobody_takes_a_place_or_learns_what_runs(self) -> None:
        with waiting_host() as (_, port, thread, raised):
            for secret in (Secret(), Secret(b"another one of the job's", "X")):
                with pytest.raises(WorldError, match="does not know this node's secret") as caught:
                    joined(port, secret=secret)
                assert "hush" not in str(caught.value)
            assert thread.is_alive(), raised
            joined(port).close()
            thread.join(60)
            assert raised == []

    def test_a_rogue_host_gets_nothing_from_a_guest_and_cannot_start_it(self) -> None:
        heard: list[bytes] = []

        def rogue(listener: socket.socket) -> None:
            with listener.accept()[0] as caller:
                caller.settimeout(5)
                heard.append(caller.recv(10_000))
                proof = json.dumps({"nonce": "0" * 32, "proof": "0" * 64}).encode() + b"\n"
                start = {"port": 9, "nonce": "0" * 32, "node_rank": 1, "environment": {"PYTHONSTARTUP": "x"}}
                # Both at once: the guest may close after the proof, with the start unread, which resets the connection.
                caller.sendall(proof + json.dumps({"start": start}).encode() + b"\n")
                with contextlib.suppress(ConnectionResetError):
                    heard.append(caller.recv(10_000))

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread, raised = in_thread(lambda: rogue(listener))
            with pytest.raises(WorldError, match="does not know this node's secret"):
                joined(listener.getsockname()[1])
            thread.join(60)
        assert raised == []
        assert set(json.loads(heard[0])) == {"rdzv", "nonce"}
        assert heard[1:] in ([], [b""])

    def test_without_a_secret_another_user_of_this_machine_does_not_pass_for_the_first_node(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with waiting_host(Secret()) as (_, port, _, _):
            monkeypatch.setattr(ports, "uid_of_peer", lambda _: os.geteuid() + 1)
            with pytest.raises(WorldError, match="is another user's process on this machine"):
                joined(port, secret=Secret())

    @pytest.mark.parametrize("secret", [Secret(b"s" * 32, "a test"), Secret()])
    def test_a_command_that_differs_is_named_on_both_and_shown_to_neither(self, secret: Secret) -> None:
        theirs = ABOUT | {"the command": "train r.py data.token=mum"}
        with waiting_host(secret) as (_, port, thread, raised):
            with pytest.raises(
                WorldError, match=r"another one on node 0, train r\.py data\.token=mum on node 1"
            ) as caught:
                joined(port, theirs, secret=secret)
            thread.join(60)
        assert "hush" not in str(caught.value)
        (error,) = raised
        assert "the command is not the same on all nodes: train r.py data.token=hush on node 0, another one" in str(
            error
        )

    def test_without_a_secret_a_refusal_names_neither_version_nor_job_id(self) -> None:
        for name, value in (("dtrain's version", "1.2.3"), ("--rdzv and --job-id", "127.0.0.1:1 mine")):
            refused = pytest.raises(WorldError, match=f"{name} is not the same on all nodes: another one on")
            with waiting_host(Secret()) as (_, port, _, _), refused as caught:
                joined(port, ABOUT | {name: value}, secret=Secret())
            assert ABOUT[name] not in str(caught.value)

    def test_a_host_that_hangs_up_first_is_tried_again(self) -> None:
        with waiting_host() as (_, port, thread, _), socket.create_server(("127.0.0.1", 0)) as crowded:
            tries: list[int] = []

            def pass_on() -> None:
                with crowded.accept()[0]:
                    tries.append(1)
                with crowded.accept()[0] as caller, socket.create_connection(("127.0.0.1", port)) as real:
                    tries.append(2)
                    pumps = [in_thread(lambda a=a, b=b: pump(a, b))[0] for a, b in ((caller, real), (real, caller))]
                    pumps[0].join(60)
                    real.shutdown(socket.SHUT_RDWR)
                    pumps[1].join(60)

            through, raised = in_thread(pass_on)
            follower = joined(crowded.getsockname()[1])
            thread.join(60)
            follower.close()
            through.join(60)
            assert (tries, raised) == ([1, 2], [])


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def listening(host: FirstNode) -> Iterator[None]:
    """What a supervisor does while its ranks run."""
    over: list[int] = []

    def listen() -> None:
        while not over:
            if host._started:
                host.news()
            time.sleep(0.02)

    thread, raised = in_thread(listen)
    try:
        yield
    finally:
        over.append(1)
        thread.join(10)
        assert raised == []


def heard_by(meeting: Rendezvous, seconds: float = 60) -> ExitMessage | None:
    deadline = time.monotonic() + seconds
    while (word := meeting.news()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return word


def test_more_nodes_than_a_process_may_open_files_by_default() -> None:
    """All connect at once, as srun starts them; select() would know no descriptor above 1023."""
    nodes = 1100
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3 * nodes, before[1]))  # this process is all of them
    guests: list[OtherNode] = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    job = replace(a_job(listener.getsockname()[1]), nodes=nodes)
    host = FirstNode(job, ABOUT, listener)
    thread, raised = in_thread(lambda: host.gather([]))
    try:
        for node in range(1, nodes):
            guests.append(OtherNode(replace(job, node_rank=node), ABOUT))
            assert guests[-1]._known_by(time.monotonic() + 60, [])
        thread.join(60)
        assert (thread.is_alive(), raised) == (False, [])
        guests[-1]._await_start(time.monotonic() + 60, [])
        assert guests[-1].job.port == host.job.port
        assert max(one.wire.fileno() for one in guests) > 1023
        guests[-1].tell(replace(WORD, node=nodes - 1))
        assert heard_by(host, 30) == replace(WORD, node=nodes - 1)
    finally:
        for one in guests:
            one.close()
        host.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_who_is_connected_when_the_time_is_over_is_not_called_missing() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    job = replace(a_job(listener.getsockname()[1]), timeout=0.5)
    host = FirstNode(job, ABOUT, listener)
    with socket.create_connection(("127.0.0.1", job.rdzv_port)) as waits:
        thread, raised = in_thread(lambda: host.gather([]))
        deadline = time.monotonic() + 10
        while not host._admission.busy and time.monotonic() < deadline:
            time.sleep(0.01)
        while time.monotonic() < host._deadline + 0.3:
            time.sleep(0.01)
        assert (thread.is_alive(), raised) == (True, []), "a node may still be saying who it is"
        guest = OtherNode(replace(job, node_rank=1, timeout=60), ABOUT)
        guest.join([])
        waits.close()
        thread.join(20)
    guest.close()
    host.close()
    assert raised == []


def test_a_launcher_that_comes_too_early_to_replace_a_lost_one_waits(capsys: pytest.CaptureFixture[str]) -> None:
    early: list[OtherNode] = []
    with waiting_host() as (host, port, thread, _), listening(host):
        guest = joined(port)
        thread.join(10)
        refused = pytest.raises(WorldError, match="is already running with all its 2 nodes")
        with refused:  # without --retries there is no next attempt
            joined(port)
        waits, raised = in_thread(lambda: early.append(joined(port, retries=2)))
        deadline = time.monotonic() + 20
        text = ""
        while "waits to take a lost node's place" not in text and time.monotonic() < deadline:
            time.sleep(0.05)
            text += capsys.readouterr().err
        assert "waits to take a lost node's place" in text
        assert waits.is_alive()
        guest.close()
    again = FirstNode(a_job(port), ABOUT, socket.create_server(("127.0.0.1", port)))
    again.gather([])
    waits.join(20)
    assert raised == []
    assert early[0].job.nonce == again.job.nonce
    early[0].close()
    again.close()


def test_a_node_by_arrival_gets_a_number() -> None:
    with waiting_host() as (_, port, thread, _):
        follower = joined(port, node_rank=BY_ARRIVAL)
        thread.join(60)
        assert follower.job.node_rank == 1
        follower.close()
