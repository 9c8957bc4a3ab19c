"""Which failures are followed by another attempt, how often, after what pause, and what is kept of each."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.errors import WorldError
from dtrain.launch import retries
from dtrain.launch.nodes.base import MissingNodesError
from dtrain.launch.retries import goes_on, may_try_again, progress, run_with_retries
from dtrain.launch.supervisor import JobEnd

FAILED = JobEnd(1, "a rank failed")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits; what would have been waited is noted."""
    noted: list[float] = []
    monkeypatch.setattr(retries, "_pause", noted.append)
    return noted


def attempts(endings: list[JobEnd | Callable[[], JobEnd]], runs: list[Path | None]) -> Callable[[Path | None], JobEnd]:
    left = iter(endings)

    def attempt(run: Path | None) -> JobEnd:
        runs.append(run)
        ending = next(left)
        return ending if isinstance(ending, JobEnd) else ending()

    return attempt


@pytest.mark.parametrize("code", [1, 76, 7, 139])
def test_failures_are_tried_again_until_one_ends_well(code: int, pauses: list[float]) -> None:
    runs: list[Path | None] = []
    ending = run_with_retries(attempts([JobEnd(code), JobEnd(code), JobEnd(0)], runs), 2)
    assert (ending.exit_code, len(runs), pauses) == (0, 3, [1.0, 2.0])


def raises() -> JobEnd:
    raise MissingNodesError("node 1 of 2 did not come to n1:29500 within 7 s.")


@pytest.mark.parametrize("follows", [False, True])
def test_a_node_that_does_not_come_back_is_one_more_failure(pauses: list[float], follows: bool) -> None:
    runs: list[Path | None] = []
    steps = [FAILED, raises, raises, JobEnd(0)]
    assert run_with_retries(attempts(steps, runs), 3, follows=follows).exit_code == 0
    assert (len(runs), pauses) == (4, [1, 2, 4])


def test_a_node_that_never_comes_back_is_given_up_on_with_the_reason() -> None:
    runs: list[Path | None] = []
    ending = run_with_retries(attempts([FAILED, *[raises] * 9], runs), 3)
    assert len(runs) == 4
    assert ending.exit_code == 1
    assert ending.text.startswith("dtrain: error: node 1 of 2 did not come to n1:29500 within 7 s.\ndtrain: giving up")


def test_nodes_that_have_never_met_are_an_error_at_once() -> None:
    with pytest.raises(WorldError, match="did not come"):
        run_with_retries(attempts([raises], []), 3)


@pytest.mark.parametrize("ending", [JobEnd(0), JobEnd(2), JobEnd(75), JobEnd(130), JobEnd(143, "", signal.SIGTERM)])
def test_what_is_no_failure_is_not_tried_again(ending: JobEnd) -> None:
    runs: list[Path | None] = []
    assert not may_try_again(ending)
    assert run_with_retries(attempts([ending], runs), 5) is ending
    assert len(runs) == 1


def test_given_up_after_so_many_without_progress(pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    runs: list[Path | None] = []
    ending = run_with_retries(attempts([FAILED] * 9, runs), 7)
    assert len(runs) == 8
    assert pauses == [1, 2, 4, 8, 16, 32, 60]
    assert ending.exit_code == 1
    assert ending.text == "a rank failed\ndtrain: giving up after 8 failures without progress."
    assert capsys.readouterr().err.count("a rank failed\ndtrain: attempt ") == 7


def test_progress_begins_the_count_anew_and_each_failure_is_kept(tmp_path: Path, pauses: list[float]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "failure-2.json").write_text("of an earlier start")

    def fails(number: int, *saved: str, rows: int = 0) -> Callable[[], JobEnd]:
        def attempt() -> JobEnd:
            for name in saved:
                (tmp_path / "checkpoints" / name).mkdir()
            (tmp_path / "history.csv").write_text("row\n" * rows)
            (tmp_path / "failure.json").write_text(json.dumps(number))
            return JobEnd(1, run=tmp_path)

        return attempt

    runs: list[Path | None] = []
    steps = [
        fails(1),
        fails(2, "epoch-1-step-5"),  # progress
        fails(3, ".epoch-1-step-7.part"),
        fails(4, "epoch-1"),  # progress: an epoch's end comes after all of its steps
        fails(5, "epoch-1-step-9"),
        fails(6, rows=2),  # progress
        fails(7, rows=2),
        fails(8, rows=2),
    ]
    ending = run_with_retries(attempts([*steps], runs), 2)
    assert ending.exit_code == 1
    assert runs == [None, *[tmp_path] * 7]
    assert pauses == [1, 1, 2, 1, 2, 1, 2]
    kept = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("failure-[!2]*.json")}
    assert json.loads((tmp_path / "failure.json").read_text()) == 8, "the last one has the usual name"
    assert sorted(kept.values()) == [1, 2, 3, 4, 5, 6, 7]


def test_another_node_follows_the_first(pauses: list[float]) -> None:
    runs: list[Path | None] = []

    def gone() -> JobEnd:
        raise WorldError("node 0 did not come")

    ending = run_with_retries(attempts([FAILED, FAILED, FAILED, gone], runs), 1, follows=True)
    assert ending is FAILED, "it does not count by itself, and ends as the last attempt that all took part in"
    with pytest.raises(WorldError):
        run_with_retries(attempts([gone], runs), 1, follows=True)


def test_the_command_line_of_what_goes_on() -> None:
    assert goes_on(["x", "train", "a.py", "--resume", "never"])[-2:] == ["--resume", "auto"]
    assert goes_on(["x", "train", "--", "a.py"]) == ["x", "train", "--resume", "auto", "--", "a.py"]
    assert progress(None) == (0, 0, 0)


def test_a_command_that_names_a_run_to_go_on_with_goes_on_with_the_one_it_began(tmp_path: Path) -> None:
    """Since it may name no config."""
    for argv in (
        ["x", "train", "--resume", "runs/old/checkpoints/epoch-1"],
        ["x", "train", "--resume=runs/old", "a=1"],
    ):
        assert goes_on(argv, tmp_path) == [*argv, "--resume", "auto"], "there is no checkpoint yet"
    (tmp_path / "checkpoints" / "epoch-2").mkdir(parents=True)
    for argv in (
        ["x", "train", "--resume", "runs/old/checkpoints/epoch-1"],
        ["x", "train", "--resume=runs/old", "a=1"],
    ):
        assert goes_on(argv, tmp_path) == [*argv, "--resume", str(tmp_path)]
    assert goes_on(["x", "train", "--resume", "auto"], tmp_path)[-2:] == ["--resume", "auto"]
