"""What launchers may send is a closed schema, and a secret comes from where nobody else can read it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.rendezvous import FAILURE, JSON, WORD
from helpers.sweep import FULL
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.launch.env.job import Job
from dtrain.launch.monitor.postmortem import RankFailure
from dtrain.launch.nodes.messages import Greeting, Hello, MessageError, Refusal, StartMessage, exit_message_of
from dtrain.launch.nodes.secret import KEY, SECRET, SECRET_FILE, Secret, read_secret


class TestMessages:
    def test_a_word_is_read_as_it_was_sent(self) -> None:
        assert exit_message_of(json.loads(json.dumps(WORD.message())), 2) == WORD
        bare = replace(WORD, failure=None, ended={}, text="")
        assert exit_message_of(json.loads(json.dumps(bare.message())), 2) == bare

    def test_a_long_word_keeps_its_end(self) -> None:
        failure = asdict(
            replace(FAILURE, traceback="t" * 10**6 + "END", exception={"type": "E", "message": "m" * 10**6})
        )
        long = replace(WORD, text="x" * 10**6 + "END", failure=failure, ended={str(n): "e" * 10**4 for n in range(500)})
        read = exit_message_of(json.loads(json.dumps(long.message())), 2)
        assert read.text.endswith("xEND")
        assert RankFailure(**(read.failure or {})).traceback.endswith("tEND")

    @pytest.mark.parametrize("name", ["environment", "host", "timeout", "log_dir", "hang_seconds", "ranks", "secret"])
    def test_a_start_sets_port_nonce_and_number_and_nothing_else(self, name: str) -> None:
        start = {"port": 9, "nonce": "0" * 32, "node_rank": 1}
        assert StartMessage.of(start, 2) == StartMessage(9, "0" * 32, 1)
        with pytest.raises(MessageError):
            StartMessage.of({**start, name: {"PYTHONSTARTUP": "x"}}, 2)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"port": 0}, {"port": 65536}, {"port": 9.0}, {"port": True}, {"port": "9"}, {"port": None},
            {"nonce": ""}, {"nonce": "A" * 32}, {"nonce": "0" * 31 + "\n"}, {"nonce": 0},
            {"node_rank": 0}, {"node_rank": 2}, {"node_rank": -1},
        ],
    )  # fmt: skip
    def test_a_start_of_wrong_values_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(MessageError):
            StartMessage.of({"port": 9, "nonce": "0" * 32, "node_rank": 1} | wrong, 2)

    def test_what_people_read_has_no_control_characters(self) -> None:
        word = exit_message_of(
            json.loads(json.dumps(replace(WORD, text="a\x1b[2Jb\r\x00\ud800\x9bc\n\td").message())), 2
        )
        assert word.text == "a?[2Jb?????c\n\td".replace("?????", "????")
        word.text.encode()

    @settings(max_examples=2000 if FULL else 150, deadline=None)
    @given(st.data())
    def test_anything_else_is_refused_as_such(self, data: st.DataObject) -> None:
        """Any JSON, and a good message with one value replaced by any JSON."""
        good = data.draw(
            st.sampled_from(
                [
                    WORD.message(),
                    {"port": 9, "nonce": "0" * 32, "node_rank": 1},
                    Refusal("late", missing=(1,)).message(),
                ]
            )
        )
        message: Any = data.draw(JSON)
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(good)))
            message = {**good, name: message}
            if name == "failure" and isinstance(good[name], dict):
                inner = data.draw(st.sampled_from(sorted(good[name])))
                message = {**good, name: {**good[name], inner: data.draw(JSON)}}
        parsers: list[Callable[[object], object]] = [
            lambda one: exit_message_of(one, 2).order,
            lambda one: StartMessage.of(one, 2),
            lambda one: Refusal.of(one, 2),
            Hello.of,
            Greeting.of,
        ]
        for parse in parsers:
            with contextlib.suppress(MessageError):
                parse(message)


class TestSecret:
    def file(self, folder: Path, text: bytes = b"s" * 32 + b"\n", mode: int = 0o600) -> Path:
        path = folder / "secret"
        path.write_bytes(text)
        path.chmod(mode)
        return path

    def test_a_file_that_was_named_comes_first_then_the_environment(self, tmp_path: Path) -> None:
        file = self.file(tmp_path)
        both = {SECRET: "from the environment", SECRET_FILE: str(file)}
        assert read_secret(file, both).value == b"s" * 32
        assert read_secret(None, both).value == b"from the environment"
        assert read_secret(None, {SECRET_FILE: str(file), SECRET: " "}).value == b"s" * 32
        assert not read_secret(None, {})

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o660])
    def test_a_file_that_others_may_read_or_change_is_refused(self, tmp_path: Path, mode: int) -> None:
        with pytest.raises(UsageError, match=rf"--rdzv-secret-file .*secret: has mode 0{mode:o}, .* chmod 600"):
            read_secret(self.file(tmp_path, mode=mode))

    def test_a_file_that_is_not_there_empty_too_long_or_no_file_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo", 0o600)
        (tmp_path / "folder").mkdir()
        for path, why in (
            (tmp_path / "none", "cannot be read: no such file or directory. Create it"),
            (tmp_path / "fifo", "is not a regular file"),
            (tmp_path / "folder", "is not a regular file"),
            (self.file(tmp_path, b" \n"), "holds nothing"),
        ):
            with pytest.raises(UsageError, match=why):
                read_secret(None, {SECRET_FILE: str(path)})
        with pytest.raises(UsageError, match="is longer than 4096 bytes"):
            read_secret(self.file(tmp_path, b"x" * 5000))

    @pytest.mark.skipif(os.geteuid() != 0, reason="root alone can give a file away")
    def test_a_file_of_another_user_is_refused(self, tmp_path: Path) -> None:
        file = self.file(tmp_path)
        os.chown(file, 65534, 65534)
        with pytest.raises(UsageError, match="belongs to user 65534"):
            read_secret(file)

    def test_it_is_shown_nowhere_and_ranks_get_a_key_instead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SECRET, "very secret words here")
        job = Job(ranks=1, nodes=2, secret=read_secret())
        variables = job.rank_environment(0, "r")
        assert "very secret" not in f"{job}{variables}"
        assert SECRET not in variables
        assert variables[KEY] == job.ranks_key().hex()
        assert replace(job, nonce="0" * 32).ranks_key() != job.ranks_key()

    def test_short_ones_are_told(self) -> None:
        assert Secret(b"short").is_short
        assert not Secret(b"s" * 16).is_short
        assert not Secret().is_short
