"""W&B never harms a run: real runs against servers on loopback that work, refuse, hang, fail and vanish.

DTRAIN_TEST_SWEEP=full pytest tests/launch/test_tracking_wandb.py    # each fault under `dtrain train`; 4 ranks
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.commands import BIN, MARK, Done, Dtrain, clean_environment
from helpers.wandb_runs import beside, made_run, more_of, offline_rows, plain, truth
from helpers.wandb_server import KEY, WandbServer

from dtrain.callbacks.tracking.files import STEPS, read_json, read_lines
from dtrain.callbacks.tracking.wandb_tracker import _WORKER
from dtrain.layout import TRACKING

FULL = os.environ.get("DTRAIN_TEST_SWEEP") == "full"
CANARY = "canary-in-the-environment"
PATIENT = "track.wandb.wait_seconds=100"  # a busy machine is no fault


@pytest.fixture
def server() -> Iterator[WandbServer]:
    found = WandbServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def nobody_sends_any_more(tmp_path: Path) -> Iterator[None]:
    """The processes that send end with their run; W&B's own service ends with those."""
    yield
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    _, alive = psutil.wait_procs(left, timeout=30)
    for process in alive:
        process.kill()
    assert alive == []


def tracked(recipe: Path, *more: object) -> tuple[object, ...]:
    return ("train", recipe, "run.name=it", "track.wandb.project=mine", *more)


def said_on_stderr(done: Done) -> list[str]:
    """Its lines; Python's own warnings, of W&B's temporary files, left out."""
    return [line for line in done.err.splitlines() if "ResourceWarning" not in line and "_warnings.warn" not in line]


def lines_of(done: Done) -> list[str]:
    return [line for line in done.text.splitlines() if "W&B" in line]


# --- no server that could be used ---------------------------------------------------------------------------


def prepare(fault: str, server: WandbServer) -> tuple[dict[str, str], str]:
    """Brings a fault about; returns the environment for it, and what is to be read."""
    url, env = server.url, server.environment()
    if fault == "refuses":
        server.vanish()
        return env, f"{url} cannot be reached: Connection refused"
    if fault == "hangs":
        server.hangs.set()
        return env, f"{url} did not answer within 4 s"
    if fault == "fails":
        server.status = 500
        return env, f"{url} answers 500"
    if fault == "no key":
        del env["WANDB_API_KEY"]
        return {
            **env,
            "NETRC": os.devnull,
        }, f"there is no API key for {url[7:]}: run `wandb login`, or set WANDB_API_KEY"
    return server.environment("wrong" * 8), f"{url} rejects the API key (401): run `wandb login --relogin`, or"


FAULTS = ["refuses", "hangs", "fails", "wrong key", "no key"]


@pytest.mark.parametrize("fault", FAULTS if FULL else FAULTS[:1])
def test_a_run_without_a_server_is_offline_with_one_line(
    fault: str, dtrain: Dtrain, recipes: Path, server: WandbServer
) -> None:
    env, words = prepare(fault, server)
    done = dtrain(*tracked(recipes / "small.py", "epochs=3", "-n", 2, "--cpu"), **env)
    assert done.code == 0, done.text
    (line,) = lines_of(done)
    assert words in line
    assert line.endswith("All values are kept; send them later with: dtrain sync runs/it")
    run = dtrain.run_folder()
    assert plain(offline_rows(run)) == plain(truth(run))
    assert len(list(run.glob("wandb/*run-*"))) == 1, "two ranks leave one run"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_and_all_is_kept(fault: str, tmp_path: Path, server: WandbServer) -> None:
    """As above, but for the training, whose place the test takes."""
    env, words = prepare(fault, server)
    run = made_run(tmp_path / "runs" / "it", epochs=2)
    told = beside(run, env, {"failed": False, "complete": True})
    assert [word["event"] for word in told] == ["up", "offline", "done"]
    assert words in told[1]["why"]
    assert told[2] == {"event": "done", "sent": False, "why": ""}
    assert plain(offline_rows(run)) == plain(truth(run))


# --- a server that works ------------------------------------------------------------------------------------


def test_a_server_gets_the_history_the_config_and_nothing_of_the_machine(
    dtrain: Dtrain, recipes: Path, server: WandbServer
) -> None:
    words = tracked(recipes / "small.py", "epochs=3", "track.artifacts=best", "track.every_seconds=0.001", PATIENT)
    done = dtrain(*words, SECRET=CANARY, **server.environment())
    assert done.code == 0, done.text
    assert [line for line in lines_of(done) if "offline" in line or "not" in line] == []
    run, sent = dtrain.run_folder(), server.the_run()
    assert sorted(server.runs) == [read_json(run / TRACKING / "ids.json")["wandb"]]
    assert plain(sent.rows()) == plain(truth(run))
    assert (sent.created, sent.exit_code) == (1, 0)
    moments = [line for line in sent.lines.values() if "step/loss" in line]
    assert len(moments) >= 3
    assert {"step/loss", "step/metric", "step/lr", "step/samples_per_second", "_step", "_timestamp"} <= set(moments[0])
    config = {name: part["value"] for name, part in sent.config.items()}
    assert config["train"]["epochs"] == 3
    assert config["about"]["parameters"] == 4
    assert "Linear" in config["about"]["model"]
    table = next(data for name, data in sent.files.items() if name.endswith("history.table.json"))
    assert b"samples_per_second" in table
    best = min(truth(run), key=lambda row: row["val_loss"])["epoch"]
    assert sent.files["model.safetensors"] == (run / f"checkpoints/epoch-{best}/model.safetensors").read_bytes()
    assert any("it-weights" in name for name in server.committed)
    everything = b"".join(server.received)
    on_disk = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    for hidden in (CANARY, KEY):
        assert hidden.encode() not in everything
        assert hidden.encode() not in on_disk
    assert b'"host":null' in everything
    for hidden in (str(dtrain.folder), "--cpu", "bin/dtrain"):
        assert hidden.encode() not in everything
    again = dtrain("sync", "runs/it", **server.environment())
    assert (again.code, said_on_stderr(again)) == (0, [])
    assert again.out.startswith("runs/it: nothing to send (3 epochs and ")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4] if FULL else [2])
def test_a_server_that_vanishes_and_a_kill_and_sync_makes_one_run_of_it(
    ranks: int, dtrain: Dtrain, recipes: Path, server: WandbServer
) -> None:
    words = tracked(recipes / "long.py", "epochs=12", "track.every_seconds=0.05", "-n", ranks, "--cpu", PATIENT)
    run = dtrain.folder / "runs" / "it"
    env = {**server.environment(), "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}
    first = start(dtrain, words, {**env, "SLOW": "0.3"})
    try:
        server.wait_for(lambda: any(run.lines for run in server.runs.values()))
        assert "dtrain.callbacks.tracking.wandb_worker" not in family_of(first), "its work is no sign of a rank's life"
        server.vanish()
        wait_until(lambda: (run / "history.csv").is_file() and len(truth(run)) >= 1, first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(60)
    at_kill = {line["_step"] for line in server.the_run().lines.values()}
    second = dtrain(*words, **env)
    assert second.code == 0, second.text
    assert len([line for line in lines_of(second) if "offline" in line]) == 1, second.text
    lost = dtrain("sync", "runs/it", **env)
    assert lost.code == 1
    assert f"runs/it: not sent: {server.url} cannot be reached: Connection refused" in lost.err
    server.start()
    looked = dtrain("sync", "--dry-run", "runs/it", **env)
    assert "runs/it: would send whatever W&B does not have yet of 12 epochs" in looked.out
    assert len(server.the_run().lines) == len(at_kill)
    for said in ("runs/it: sent, 12 epochs", "runs/it: nothing to send (12 epochs"):
        done = dtrain("sync", "runs/it", **env)
        assert (done.code, said_on_stderr(done)) == (0, [])
        assert done.out.startswith(said)
        sent = server.the_run()
        assert plain(sent.rows()) == plain(truth(run))
        steps = [line["_step"] for _, line in sorted(sent.lines.items())]
        assert steps == sorted(set(steps))
        assert (sent.created, sent.exit_code) == (1, 0)
    moments = [line["updates"] for line in read_lines(run / TRACKING / STEPS) if "updates" in line]
    assert set(moments) >= {line["_step"] for line in sent.lines.values()} - at_kill


def family_of(process: subprocess.Popen[bytes]) -> str:
    """The command lines of all that a launcher has started, and what that has started."""
    lines = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            lines.append(" ".join(one.cmdline()))
    assert any("train" in line for line in lines)
    return "\n".join(lines)


def start(dtrain: Dtrain, words: tuple[object, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(word) for word in (BIN / "dtrain", *words)],
        cwd=dtrain.folder,
        env=clean_environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until(condition: Any, process: subprocess.Popen[bytes], seconds: float = 200) -> None:
    import time

    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_server_that_vanishes_at_the_end_holds_nobody_up(tmp_path: Path, server: WandbServer) -> None:
    run = made_run(tmp_path / "it", epochs=1, wait_seconds=2.0)
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={k: v for k, v in clean_environment(**server.environment()).items() if k != MARK},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    server.wait_for(lambda: "UpsertBucket" in server.operations)
    server.vanish()
    process.stdin.write('{"failed": false, "complete": true}\n')
    process.stdin.close()
    told = process.stdout.read()
    process.stdout.close()
    process.wait(60)
    assert f'"sent": false, "why": "{server.url} cannot be reached: Connection refused"' in told
    assert "sent" not in read_json(run / TRACKING / "wandb.json")


def test_a_server_that_comes_later_gets_all(tmp_path: Path, server: WandbServer) -> None:
    run = made_run(tmp_path / "it", epochs=2)
    server.vanish()
    often = "import sys, dtrain.callbacks.tracking.wandb_worker as b; b._AGAIN_SECONDS = 0.2; b.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", often, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={k: v for k, v in clean_environment(**server.environment()).items() if k != MARK},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [word["event"] for word in told] == ["up", "offline"]
    server.start()
    assert json.loads(process.stdout.readline())["event"] == "online"
    process.stdin.write('{"failed": false, "complete": true}\n')
    process.stdin.close()
    assert json.loads(process.stdout.readline()) == {"event": "done", "sent": True, "why": ""}
    process.stdout.close()
    process.wait(60)
    assert plain(server.the_run().rows()) == plain(truth(run))


def test_a_client_that_gave_up_in_silence_is_found_out(tmp_path: Path, server: WandbServer) -> None:
    """A 401 of a moment ends W&B's stream for good, and its client says nothing of it, then or at the end."""
    run = made_run(tmp_path / "it", epochs=2, wait_seconds=20.0)
    server.loses_streams = True
    *_, done = beside(run, server.environment(), {"failed": False, "complete": True})
    assert done["sent"] is False
    assert f"{server.url} has them up to optimizer step 0 of 20" in done["why"]
    server.loses_streams = False
    synced = subprocess.run(
        [BIN / "dtrain", "sync", run], capture_output=True, check=True, text=True, timeout=120,
        env=clean_environment(**server.environment()), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "sent, 2 epochs and 2 sets of values within epochs: http://" in synced.stdout
    assert plain(server.the_run().rows()) == plain(truth(run))
    times = [line["_timestamp"] for _, line in sorted(server.the_run().lines.items())]
    assert times == [1e9 + 1, 1e9 + 1.5, 1e9 + 2, 1e9 + 2.5]  # when they came, not when they were sent


def test_a_killed_training_leaves_what_is_not_computed_anew(tmp_path: Path, server: WandbServer) -> None:
    run = made_run(tmp_path / "it", epochs=2)
    steps = run / TRACKING / STEPS
    steps.write_text(steps.read_text().replace('{"firm": 2}\n', ""))
    told = beside(run, server.environment(), end=None)
    assert told[-1]["sent"] is True
    assert [row["epoch"] for row in server.the_run().rows()] == [1]
    assert server.the_run().exit_code == 1
    assert "history.table.json" not in server.the_run().files


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_stopped_between_an_epochs_last_step_and_its_row_sends_both(
    mode: str, tmp_path: Path, server: WandbServer
) -> None:
    """Both have the same optimizer step, and W&B takes nothing at a step that an earlier process has sent."""
    run, env = made_run(tmp_path / "it", epochs=1, mode=mode), server.environment()
    more_of(run, {"updates": 20, "at": 1e9 + 2, "step/loss": 0.5})
    beside(run, env, {"failed": False, "complete": False})
    more_of(run, {"row": 2, "updates": 20, "at": 1e9 + 2.5}, {"firm": 2}, row="2,0.25,0.125\n")
    more_of(run, {"updates": 21, "at": 1e9 + 3, "step/loss": 0.4})
    beside(run, env, {"failed": False, "complete": False})
    more_of(run, {"row": 3, "updates": 30, "at": 1e9 + 3.5}, {"firm": 3}, row="3,0.125,0.5\n")
    for _ in range(2):  # a start that has nothing new sends nothing again
        beside(run, env, {"failed": False, "complete": True})
    sent = server.the_run().rows() if mode == "online" else offline_rows(run)
    assert plain(sent) == plain(truth(run))
    if mode == "online":
        losses = [line["step/loss"] for _, line in sorted(server.the_run().lines.items()) if "step/loss" in line]
        assert losses == [1.0, 0.5, 0.4]
    else:  # what lies in several parts is sent as one
        synced = subprocess.run(
            [BIN / "dtrain", "sync", run], capture_output=True, check=True, text=True, timeout=120,
            env=clean_environment(**env), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "sent, 3 epochs" in synced.stdout
        assert plain(server.the_run().rows()) == plain(truth(run))


# --- what cannot be sent ------------------------------------------------------------------------------------


def test_what_cannot_be_sent_is_told_with_the_remedy(dtrain: Dtrain, server: WandbServer) -> None:
    made_run(dtrain.folder / "good", epochs=1)
    made_run(dtrain.folder / "plain", epochs=1)
    (dtrain.folder / "plain" / TRACKING / "about.json").unlink()
    env = {**server.environment(), "NETRC": os.devnull}
    done = dtrain("sync", "none", "plain", "good", **env)
    assert done.code == 2
    assert done.err.splitlines() == [
        "dtrain: error: none: no run here. Use a run's folder, such as runs/NAME.",
        "dtrain: error: plain: this run is not tracked by W&B. Train with track.wandb.project=NAME.",
    ]
    assert done.out.startswith("good: sent, 1 epoch and 1 sets of values within epochs: http://")
    made_run(dtrain.folder / "other", epochs=1, id="def456")
    del env["WANDB_API_KEY"]
    nobody = dtrain("sync", "other", **env)
    assert nobody.code == 2
    assert f"there is no API key for {server.url[7:]}: run `wandb login`, or set WANDB_API_KEY" in nobody.err
