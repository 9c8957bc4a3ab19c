"""`dtrain train` killed at any time and started again: real processes, real signals.

DTRAIN_TEST_SWEEP=full pytest tests/launch/test_resume.py    # two hundred kills, and sixty on four ranks
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from helpers.commands import BIN, Dtrain, clean_environment
from helpers.running import running, wait_for
from helpers.sweep import FULL
from safetensors.torch import load_file

from dtrain.checkpoint.locate import find_good
from dtrain.checkpoint.weights import WEIGHTS
from dtrain.errors import CheckpointError
from dtrain.rundir.history import read_history

KILLS = 200 if FULL else 3
KILLS_OF_FOUR = 60 if FULL else 2
TIMES = ["seconds", "samples_per_second"]


def words(recipes: Path, *more: str, ranks: int = 2) -> list[str]:
    return ["train", str(recipes / "resumable.py"), "-n", str(ranks), "--cpu", "epochs=3", *more]


def killed_after(dtrain: Dtrain, seconds: float, *arguments: str) -> int:
    """Starts a run and kills all its processes after so long; returns its exit code where it ended before."""
    with (dtrain.folder / "said").open("w") as said:
        run = subprocess.Popen(
            [BIN / "dtrain", *arguments],
            cwd=dtrain.folder,
            env=clean_environment(),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        return run.wait(60)


def killed_at_work(dtrain: Dtrain, seconds: float, draw: random.Random, *arguments: str) -> tuple[int, str]:
    """Starts a run and kills one of its processes after so long: the launcher, or a rank, each about as often.

    Args:
        dtrain: where.
        seconds: after the start, or in a warm process after the first rank is there.
        draw: chooses which.
        arguments: the command's words.

    Returns:
        its exit code, and which was killed: launcher or rank N; nothing where it ended before.
    """
    with running(dtrain.folder, *arguments) as run:
        if not FULL:
            wait_for(lambda: ranks_of(run.process.pid) or run.process.poll() is not None, "a rank")
        began = time.monotonic()
        while run.process.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.002)
        ranks = ranks_of(run.process.pid)
        rank = draw.choice(sorted(ranks)) if ranks and draw.random() < 0.5 else None
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.process.pid if rank is None else ranks[rank], signal.SIGKILL)
        code = run.end()
        assert code in {0, 1, -signal.SIGKILL}, run.text
        if code == 1:
            assert rank is not None, run.text
            assert f"rank {rank} was killed by SIGKILL" in run.text
        return code, "" if code == 0 else "launcher" if code < 0 else f"rank {rank}"


def ranks_of(launcher: int) -> dict[int, int]:
    """Returns the process ids of a launcher's ranks."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error):
                number = process.environ().get("RANK", "")
                found |= {int(number): process.pid} if number else {}
    return found


def place_of(run: Path) -> float:
    """Returns where the last good checkpoint of a run is, as a number that grows; 0 where it has none."""
    found = find_good(run / "checkpoints") if run.exists() else None
    return 0.0 if found is None else found.saved.facts["epoch"] + (found.saved.step or 999) / 1000


def history_of(run: Path) -> pd.DataFrame:
    return read_history(run).drop(columns=TIMES)


def state_of(run: Path) -> dict[str, Any]:
    """All that the last checkpoint holds, by bytes; but for how long things took."""
    last = run / "checkpoints" / "epoch-3"
    tensors = {
        f"{name}/{key}": tensor.numpy().tobytes()
        for name in ("model", "state", "ranks")
        for key, tensor in load_file(last / f"{name}.safetensors").items()
    }
    structure = json.loads((last / "state.json").read_text())
    pairs = {key: value for key, value in structure["dict"] if key not in ("seconds", "rows")}
    return {**tensors, "structure": json.dumps(pairs)}


@pytest.mark.timeout(7200 if FULL else 600)
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(dtrain: Dtrain, recipes: Path) -> None:
    every = ["model.pause=0.05", "checkpoint.every_steps=1", "data.workers=2"]
    began = time.monotonic()
    whole = dtrain.cold(*words(recipes, "run.name=whole", *every))  # as long as those that are killed
    seconds = time.monotonic() - began
    assert whole.code == 0, whole.text
    draw, kills, starts = random.Random(11), 0, 0
    run = dtrain.folder / "runs" / "cut"
    seen = 0.0
    while kills < KILLS:
        code = killed_after(dtrain, seconds * draw.uniform(0.3, 1), *words(recipes, "run.name=cut", *every))
        starts += 1
        if code == 0:
            check_equal(dtrain.folder / "runs" / "whole", run)
            shutil.rmtree(run)
            seen = 0.0
            continue
        assert code == -signal.SIGKILL, (dtrain.folder / "said").read_text()
        kills += 1
        place = place_of(run)
        assert place >= seen, "a kill takes nothing back"
        seen = place
    done = dtrain(*words(recipes, "run.name=cut", *every))
    assert done.code == 0, done.text
    check_equal(dtrain.folder / "runs" / "whole", run)
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.mark.timeout(7200 if FULL else 300)
def test_on_four_ranks_whichever_process_is_killed_it_ends_as_if_none_had_been(dtrain: Dtrain, recipes: Path) -> None:
    every = ["data.n=96", "model.pause=0.02", "checkpoint.every_steps=1"]
    cut, run = words(recipes, "run.name=cut", *every, ranks=4), dtrain.folder / "runs" / "cut"
    began = time.monotonic()
    whole = dtrain(*words(recipes, "run.name=whole", *every, ranks=4))
    seconds = time.monotonic() - began
    assert whole.code == 0, whole.text
    draw, left, seen = random.Random(12), KILLS_OF_FOUR, 0.0
    while left:
        code, victim = killed_at_work(dtrain, seconds * draw.uniform(0.1, 1), draw, *cut)
        if code == 0:
            check_equal(dtrain.folder / "runs" / "whole", run)
            shutil.rmtree(run)
            seen = 0.0
            continue
        left -= 1
        place = place_of(run)
        print(f"{victim} was killed, {left} kills are left; the last checkpoint is {place}")
        assert place >= seen, "a kill takes nothing back"
        seen = place
    done = dtrain(*cut)
    assert done.code == 0, done.text
    check_equal(dtrain.folder / "runs" / "whole", run)
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def check_equal(one: Path, two: Path) -> None:
    pd.testing.assert_frame_equal(history_of(one), history_of(two), check_exact=True)
    states = state_of(one), state_of(two)
    assert [name for name in states[0] if states[0][name] != states[1].get(name)] == []


def test_another_number_of_ranks_goes_on_with_the_same_batches(dtrain: Dtrain, recipes: Path) -> None:
    common = ["train", recipes / "resumable.py", "--cpu", "epochs=2", "model.dropout=0", "train.batch=global"]
    common += ["sync_batchnorm=true", "checkpoint.every_steps=5", "checkpoint.keep_last=9", "run.name=it", "data.n=47"]
    recipe = dtrain.folder / "plain.py"
    # Adam would make whole steps of gradients that are zero but for rounding, as that of a bias before BatchNorm.
    text = (recipes / "resumable.py").read_text().replace("+ 0.1 * noise", "").replace("AdamW", "SGD")
    recipe.write_text(text)
    common[1] = recipe
    whole = dtrain(*common, "-n", 2, "run.name=whole")
    assert whole.code == 0, whole.text
    for ranks in (1, 3):
        it = dtrain.folder / "runs" / "it"
        shutil.copytree(dtrain.folder / "runs" / "whole", it)
        for path in (it / "checkpoints").iterdir():
            if path.name != "epoch-1-step-10":
                shutil.rmtree(path)
        done = dtrain(*common, "-n", ranks)
        assert done.code == 0, done.text
        assert "resuming from runs/it/checkpoints/epoch-1-step-10" in done.out
        frames = [history_of(dtrain.folder / "runs" / name) for name in ("whole", "it")]
        # The metric is isn't an average over samples.
        one, two = (frame.drop(columns=["metric", "val_metric"]) for frame in frames)
        pd.testing.assert_frame_equal(one, two, rtol=1e-4)
        nets = [load_file(dtrain.folder / f"runs/{name}/checkpoints/epoch-2/{WEIGHTS}") for name in ("whole", "it")]
        for name in nets[0].keys() - {"order"}:
            torch.testing.assert_close(nets[0][name], nets[1][name], rtol=1e-3, atol=1e-5)
        shutil.rmtree(it)


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(dtrain: Dtrain, recipes: Path) -> None:
    start = ["train", recipes / "resumable.py", "--cpu", "epochs=3", "run.name=it", "checkpoint.keep_best=0"]
    assert dtrain(*start).code == 0
    run = dtrain.folder / "runs" / "it"
    before = history_of(run)
    file = run / "checkpoints" / "epoch-3" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = dtrain(*start)
    assert done.code == 0, done.text
    assert "skipped checkpoint: runs/it/checkpoints/epoch-3/state.safetensors is damaged" in done.out
    assert "resuming from runs/it/checkpoints/epoch-2" in done.out
    pd.testing.assert_frame_equal(before, history_of(run), check_exact=True)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [".epoch-3.damaged-1", "epoch-2", "epoch-3"]
    for path in (run / "checkpoints").glob("epoch-*"):
        (path / "manifest.json").unlink()
    none = dtrain(*start)
    assert none.code == 1
    assert "no valid checkpoint" in none.err and "epoch-2/manifest.json" in none.err
    pd.testing.assert_frame_equal(before, history_of(run), check_exact=True)


def test_a_full_disk_ends_the_run_or_is_a_warning(dtrain: Dtrain, recipes: Path) -> None:
    """On a small tmpfs of the test's own."""
    disk = dtrain.folder / "disk"
    disk.mkdir()
    command = [str(BIN / "dtrain"), "train", str(recipes / "resumable.py"), "--cpu", "epochs=3", "run.dir=disk"]
    command += ["run.name=it", "model.hidden=2000", "checkpoint.keep_best=0", "checkpoint.keep_last=1"]
    # Room for one checkpoint and a half; what is seen there is copied out, since the disk goes with the process.
    script = 'mount -t tmpfs -o size=520k tmpfs disk && "$@"; code=$?; cp -a disk seen; exit $code'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if dtrain.run("unshare", "--map-root-user", "--mount", "true").code != 0:
        pytest.skip("no mount of one's own here")
    for policy, code in (("stop", 1), ("warn", 0)):
        done = dtrain.run(*inside, *command, f"checkpoint.on_error={policy}")
        assert done.code == code, done.text
        assert "No space left on device" in done.err
        seen = dtrain.folder / "seen" / "it"
        assert [path.name for path in (seen / "checkpoints").iterdir()] == ["epoch-1"], "nothing half-written"
        found = find_good(seen / "checkpoints")
        assert found is not None and found.saved.epoch == 1
        assert len(read_history(seen)) == (3 if policy == "warn" else 2)
        shutil.rmtree(dtrain.folder / "seen")


def test_none_good_is_no_start_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "epoch-1").mkdir()
    with pytest.raises(CheckpointError):
        find_good(tmp_path)
