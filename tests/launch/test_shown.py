"""What `dtrain train` shows: on a real terminal, in a pipe, of several ranks, and to programs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import BIN, Dtrain
from helpers.running import running
from helpers.terminals import Terminal, on_terminal

FULL = os.environ.get("DTRAIN_TEST_SWEEP") == "full"
BAR = "━"
BATCH = 4  # of the recipe's loader
FREE_PORT = ["--main_process_port", "0"]
ACCELERATE = [BIN / "accelerate", "launch", "--multi_gpu", *FREE_PORT, "--num_processes"]
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node"]
# What is drawn again and again begins so.
DRAWN = re.compile(r"(train \d+/\d+|valid \d+/\d+|epoch \d+/\d+|loss \S+  acc)")


def train(recipes: Path, *more: object) -> list[object]:
    return ["train", recipes / "chatty.py", "epochs=2", "run.name=it", *more]


def words_of(ranks: int) -> list[str]:
    """What the recipe prints, each line once."""
    lines = ["100% of something else"]
    for rank in range(ranks):
        lines += [f"rank {rank} prints in a step", f"C writes on rank {rank}"]
        lines += [f"the first half and, on rank {rank}, the second"]
    return lines


def batch_words(ranks: int) -> list[str]:
    """What is said of ranks whose batches are each the loader's."""
    said = f"{ranks} ranks x batch {BATCH} = {ranks * BATCH} samples per step; train.batch=global keeps {BATCH}"
    return [said] if ranks > 1 else []


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs/it/history.csv").read_text().splitlines()))


def assert_clean(terminal: Terminal, folder: Path, ranks: int, *, supervised: bool = True) -> None:
    """All that was printed is there, whole and once; of what was drawn, nothing.

    Where nobody lets the ranks take turns, several lines of C that come between two drawings stand before what was
    drawn there.
    """
    lines = terminal.lines
    for word in words_of(ranks):
        if word.startswith("C ") and not supervised:
            (line,) = (line for line in lines if line.startswith(word))
            lines[lines.index(line)] = word
        assert lines.count(word) == 1, f"{word!r}\n{terminal.text}"
    unwrapped = "".join(terminal.screen.display)  # Python puts the whole path before it
    assert [rank for rank in range(ranks) if f"UserWarning: rank {rank} warns" in unwrapped] == list(range(ranks))
    assert lines.count("a worker says") == 2  # once an epoch, whichever rank has the sample
    assert len([line for line in lines if line.startswith("two lines of rank ")]) == 2
    assert BAR not in "".join(lines)
    assert "\x1b[?25l" not in terminal.seen.decode()  # the cursor is never hidden, so that no end can leave it so
    epochs = [line for line in lines if re.match(r"epoch \d", line)]
    assert [line.split()[1] for line in epochs] == ["1", "2"]
    for line, row in zip(epochs, rows_of(folder), strict=True):
        shown = dict(zip(line.split()[2::2], line.split()[3::2], strict=False))
        for name in ("loss", "val_loss"):
            assert shown[name] == f"{float(row[name]):.4g}"


def assert_sensible(terminal: Terminal, columns: int) -> list[list[str]]:
    """Returns the drawings; in none of them is a line broken in two."""
    drawings = []
    for frame in terminal.frames:
        drawn = [line for line in frame if DRAWN.match(line)]
        if any(line.startswith("loss ") for line in drawn) and len(drawn) == 3:
            drawings.append(drawn)
            assert frame[-3:] == drawn, "\n".join(frame)
            assert all(len(line) < columns for line in drawn)
    assert drawings
    return drawings


@pytest.mark.parametrize("columns", [60, 80, 200] if FULL else [60])
def test_on_a_terminal(tmp_path: Path, recipes: Path, columns: int) -> None:
    argv = [BIN / "dtrain", *train(recipes, "--cpu")]
    with on_terminal(argv, tmp_path, columns=columns) as (process, terminal):
        terminal.to_the_end()
        assert process.wait(60) == 0, terminal.text
    assert_clean(terminal, tmp_path, 1)
    drawings = assert_sensible(terminal, columns)
    assert terminal.lines[-3:] == [
        next(line for line in terminal.lines if line.startswith("best epoch: ")),
        "run: runs/it",
        "next: dtrain evaluate runs/it",
    ]
    late = [drawn for drawn in drawings if drawn[0].startswith("train ") and drawn[0].endswith(" left")][-1]
    assert all(BAR in line for line in late[:2])
    assert re.search(r"  [\d.]+ samples/s  \d:\d\d left$", late[0])
    assert re.search(r"  \d:\d\d left$", late[1])
    assert re.match(r"loss \d\S+  accuracy 0.5  f1_macro_averaged 0.25", late[2])
    assert "lr 0.001" in late[2]


def test_four_ranks_on_one_terminal(tmp_path: Path, recipes: Path) -> None:
    argv = [BIN / "dtrain", *train(recipes, "-n", 4, "--cpu")]
    with on_terminal(argv, tmp_path, columns=80) as (process, terminal):
        terminal.to_the_end()
        assert process.wait(60) == 0, terminal.text
    assert_clean(terminal, tmp_path, 4)
    assert_sensible(terminal, 80)
    log = (tmp_path / "runs/it/logs/rank-0.log").read_text()
    assert BAR not in log
    assert [line.split()[1] for line in log.splitlines() if re.match(r"epoch \d", line)] == ["1", "2"]


def test_four_ranks_under_accelerate_launch(tmp_path: Path, recipes: Path) -> None:
    argv = [*ACCELERATE, 4, "-m", "dtrain", *train(recipes)]
    with on_terminal(argv, tmp_path, columns=80, rows=80, ACCELERATE_USE_CPU="true") as (process, terminal):
        terminal.to_the_end()
        assert process.wait(60) == 0, terminal.text
    assert_clean(terminal, tmp_path, 4, supervised=False)
    assert_sensible(terminal, 80)


def test_a_stop_by_ctrl_c(tmp_path: Path, recipes: Path) -> None:
    argv = [BIN / "dtrain", *train(recipes, "--cpu", "epochs=500")]
    with on_terminal(argv, tmp_path, columns=80) as (process, terminal):
        terminal.until(lambda: "epoch 2/500" in terminal.text, "the second epoch")
        process.send_signal(signal.SIGINT)
        terminal.to_the_end()
        assert process.wait(60) == 75, terminal.text
    said = "dtrain: stopping on request (SIGINT), saving a checkpoint; press Ctrl-C again to stop at once."
    assert " ".join(terminal.lines).count(said) == 1, terminal.text
    assert BAR not in terminal.text
    assert "resume with: dtrain train " in terminal.text


# --- no terminal --------------------------------------------------------------------------------------


def epochs_in(text: str) -> list[str]:
    return re.findall(r"^.*EPOCH = \d+", text, re.MULTILINE)


def test_four_ranks_of_accelerate_launch_in_a_pipe(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain.run(*ACCELERATE, 4, "-m", "dtrain", *train(recipes, "log_step_freq=4"))
    assert done.code == 0, done.text
    assert "\x1b" not in done.text
    assert epochs_in(done.out) == ["EPOCH = 1", "EPOCH = 2"]
    assert done.out.count("[step = 4] rank 0: loss: ") == done.out.count("[step = 8] rank 0: loss: ") == 2
    for word in words_of(4)[1:]:
        if word.startswith("the first half"):  # which a buffer gave up in two halves, if another rank came in between
            continue
        assert done.text.splitlines().count(word) == 1, word
    assert done.err.count(" warns") == 2 * 4  # the warning and its line of code
    assert [line for line in done.out.splitlines() if "samples per step" in line] == batch_words(4)


@pytest.mark.parametrize("form", ["auto", "json"] if FULL else ["auto"])
def test_every_rank_speaks_where_that_was_asked_for(dtrain: Dtrain, recipes: Path, form: str) -> None:
    done = dtrain(*train(recipes, "-n", 2, "--cpu", "log_step_freq=8", "--all-ranks", "--log-format", form))
    assert done.code == 0, done.text
    if form == "json":
        told = events(done.out)
        assert [(e["rank"], e["epoch"]) for e in told if e["event"] == "epoch" and e["rank"] == 1] == [(1, 1), (1, 2)]
        steps = {(e["rank"], e["of_rank"], e["epoch"], e["step"]) for e in told if e["event"] == "step"}
        assert steps == {(rank, rank, epoch, 8) for rank in (0, 1) for epoch in (1, 2)}
        return
    lines = done.text.splitlines()
    assert sorted(epochs_in(done.out)) == sorted(f"[rank {r}] EPOCH = {e}" for r in (0, 1) for e in (1, 2))
    for rank in (0, 1):
        assert lines.count(f"[rank {rank}] rank {rank} prints in a step") == 1
        assert lines.count(f"[rank {rank}] the first half and, on rank {rank}, the second") == 1
        assert len([line for line in lines if line.startswith(f"[rank {rank}] [step = 8] loss: ")]) == 2
    assert lines.count("[rank 0] next: dtrain evaluate runs/it") == 1
    assert [line for line in lines if "samples per step" in line] == [f"[rank 0] {line}" for line in batch_words(2)]
    assert [line for line in lines if not line.startswith(("[rank 0] ", "[rank 1] ", "C writes"))] == []


# --- programs -----------------------------------------------------------------------------------------


def events(text: str) -> list[dict[str, Any]]:
    """Every line of the standard output is one; what Python's own reader takes besides JSON is refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


LAUNCHERS: dict[str, tuple[Sequence[object], int]] = {
    "alone": ([BIN / "dtrain"], 1),
    "dtrain launch": ([BIN / "dtrain", "launch", "-n", 2, "--cpu", "--"], 2),
    "accelerate": ([*ACCELERATE, 2, "-m", "dtrain"], 2),
    "torchrun": ([*TORCHRUN, 2, "-m", "dtrain"], 2),
}
DEFAULT = ("dtrain launch",)


@pytest.mark.parametrize("launcher", list(LAUNCHERS) if FULL else DEFAULT)
def test_events_are_the_history_to_the_last_digit(dtrain: Dtrain, recipes: Path, launcher: str) -> None:
    argv, ranks = LAUNCHERS[launcher]
    done = dtrain.run(*argv, *train(recipes, "log_step_freq=4", "--log-format", "json", "--log-level", "info"))
    assert done.code == 0, done.text
    told = events(done.out)
    start, *_ = told
    expected = {"event": "start", "run": "runs/it", "config": "runs/it/config.yaml", "ranks": ranks, "epochs": 2}
    expected |= {"epoch": 1, "step": 0, "checkpoint": None, "samples": BATCH * ranks}
    assert start["device"].startswith("cpu")
    assert {name: start[name] for name in expected} == expected
    steps = [event for event in told if event["event"] == "step"]
    assert [(e["epoch"], e["step"], e["steps"], e["updates"]) for e in steps] == [
        (1, 4, 8, 4), (1, 8, 8, 8), (2, 4, 8, 12), (2, 8, 8, 16),
    ]  # fmt: skip
    assert steps[0]["of_rank"] == 0
    assert steps[0]["running"]["accuracy"] == 0.5
    if ranks == 1:  # rank 0's own are then all there are
        assert steps[1]["running"] == {name: told_row(told, 1)[name] for name in steps[1]["running"]}
    rows = [event["row"] for event in told if event["event"] == "epoch"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    assert buffer.getvalue() == (dtrain.folder / "runs/it/history.csv").read_text()
    assert told[-1] | {"at": 0} == {
        "event": "complete", "at": 0, "run": "runs/it", "epochs": 2, "monitor": "val_loss", "ended": None,
        "best": min(rows, key=lambda row: row["val_loss"])["epoch"],
    }  # fmt: skip
    logged = [event for event in told if event["event"] == "log"]
    assert ("info", "dtrain.engine.train_step", "the train step is declarative") in [
        (event["level"], event["logger"], event["text"]) for event in logged
    ]
    warned = [event["of_rank"] for event in logged if event["logger"] == "py.warnings" and " warns" in event["text"]]
    assert sorted(warned) == list(range(ranks))
    for word in words_of(ranks)[1:]:  # what is no event is on standard error, words of dtrain's own included
        assert done.err.splitlines().count(word) == 1 or word.startswith("the first half")
    assert "next: dtrain evaluate runs/it" in done.err
    assert [line for line in done.err.splitlines() if "samples per step" in line] == batch_words(ranks)


def told_row(told: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    (row,) = (event["row"] for event in told if event["event"] == "epoch" and event["epoch"] == epoch)
    return row


@pytest.mark.parametrize("form", ["dtrain train -n", "dtrain launch"] if FULL else ["dtrain launch"])
def test_a_rank_that_dies_is_an_event(dtrain: Dtrain, recipes: Path, form: str) -> None:
    words = ["train", recipes / "small.py", "fault=kill@1", "--log-format=json"]
    argv = [*words, "-n", 2, "--cpu"] if form == "dtrain train -n" else ["launch", "-n", 2, "--cpu", "--", *words]
    done = dtrain(*argv)
    assert done.code == 1
    told = events(done.out)
    assert [event["event"] for event in told] == ["start", "failed"]
    facts = {"exit_code": 1, "rank": 1, "epoch": 1, "step": 1, "phase": "train", "cause": "killed"}
    assert {name: told[-1][name] for name in facts} == facts
    assert told[-1]["text"] in done.err


def test_a_failure_in_one_process_and_bad_usage_are_events(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("train", recipes / "small.py", "fault=raise", "--cpu", "--log-format=json")
    assert [event["event"] for event in events(done.out)] == ["start", "failed"]
    assert "ValueError: a fault of the user's own" in events(done.out)[-1]["text"]
    done = dtrain("train", recipes / "small.py", "epochs=x", "--log-format=json")
    assert done.code == 2
    (event,) = events(done.out)
    assert (event["event"], event["exit_code"]) == ("failed", 2)
    assert event["text"] == done.err.rstrip("\n")


def test_what_goes_on_says_from_where(dtrain: Dtrain, recipes: Path) -> None:
    words = ["train", recipes / "small.py", "run.name=it", "--cpu", "--log-format=json"]
    for epochs, begins in ((1, {"epoch": 1, "checkpoint": None}), (2, {"epoch": 2})):
        done = dtrain(*words, f"epochs={epochs}")
        assert done.code == 0, done.text
        told = events(done.out)
        assert [event["event"] for event in told] == ["start", "epoch", "complete"]
        assert {name: told[0][name] for name in begins} == begins
    assert told[0]["checkpoint"].endswith("runs/it/checkpoints/epoch-1")
    assert f"resuming from {told[0]['checkpoint']}" in done.err
    done = dtrain(*words, "epochs=2")  # nothing is left to do
    assert [event["event"] for event in events(done.out)] == ["complete"]


def test_a_stop_is_an_event(recipes: Path, tmp_path: Path) -> None:
    words = ["train", recipes / "long.py", "--cpu", "epochs=1000", "run.name=it", "--log-format=json"]
    with running(tmp_path, *words) as run:
        run.until("train-0")
        run.send(signal.SIGTERM)
        assert run.end() == 75, run.text
    stopped = next(json.loads(line) for line in run.text.splitlines() if '"stopped"' in line)
    assert stopped["exit_code"] == 75
    assert "resume with: dtrain train" in stopped["text"]


def test_a_row_that_is_no_number(dtrain: Dtrain, recipes: Path) -> None:
    lr = "1e30"  # the loss is infinite by the second epoch, and then it is none at all
    done = dtrain("train", recipes / "small.py", f"lr={lr}", "nan=ignore", "epochs=4", "--cpu", "--log-format=json")
    assert done.code == 0, done.text
    rows = [event["row"] for event in events(done.out) if event["event"] == "epoch"]
    assert rows[-1]["loss"] == "nan"
    assert (dtrain.run_folder() / "history.csv").read_text().splitlines()[-1].split(",")[1] == "nan"
