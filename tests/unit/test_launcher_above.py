"""Which launcher has started a process, from command lines; and what its supervisor does when that one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launch.signals.escalation import Escalation
from dtrain.launch.signals.launcher import Launcher, launcher_above, launcher_name
from dtrain.launch.signals.owner import started_at
from dtrain.launch.signals.stop_request import read_stop_request


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/opt/env/bin/python /opt/env/bin/torchrun --nproc-per-node 2 -m dtrain train", "torchrun"),
        ("/usr/bin/python3.11 -u -X dev -m torch.distributed.run x.py", "torchrun"),
        ("python -W ignore /bin/accelerate launch -m dtrain train", "accelerate"),
        ("python3 -m accelerate.commands.launch x.py", "accelerate"),
        ("slurmstepd: [12.0]", "slurmstepd"),
        ("/usr/sbin/slurmstepd", "slurmstepd"),
        ("prterun -n 2 dtrain train", "prterun"),
        ("/usr/lib/hydra_pmi_proxy --control-port x", "hydra_pmi_proxy"),
        ("bash -c torchrun", ""),
        ("python -c import torchrun", ""),
        ("python train.py torchrun", ""),
        ("python -m dtrain train torchrun", ""),
        ("vim /bin/torchrun", ""),
        ("python", ""),
        ("", ""),
    ],
)
def test_launchers_are_known_by_their_command_lines(command: str, name: str) -> None:
    assert launcher_name([command] if command.startswith("slurmstepd:") else command.split()) == name


def seen(proc: Path, pid: int, parent: int, *argv: str) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in argv))
    (folder / "stat").write_text(f"{pid} (a) b) S {parent} 1 1")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_nearest_launcher_above_counts_whatever_stands_between(tmp_path: Path) -> None:
    here = os.getpid()
    seen(tmp_path, 9000001, 9000002, "python", "/bin/dtrain", "train")
    seen(tmp_path, 9000002, here, "bash", "run.sh")
    seen(tmp_path, here, 9000003, "python", "/bin/torchrun", "run.sh")
    seen(tmp_path, 9000003, 1, "slurmstepd: [7.0]")
    seen(tmp_path, 1, 0, "/sbin/init")
    found = launcher_above(9000001, tmp_path)
    assert found == Launcher("torchrun", here, started_at(here) or 0)
    assert launcher_above(9000003, tmp_path) is None


def test_a_killed_launcher_asks_the_rank_to_stop_and_then_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("dtrain.launch.signals.escalation.time.monotonic", lambda: now[0])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        launcher = Launcher("torchrun", process.pid, started_at(process.pid) or 0)
        orders = Escalation([], 600.0, tmp_path, launcher=launcher, silent=True)
        assert not orders.end_now()
        assert read_stop_request(tmp_path) == ""
        process.kill()
    assert not orders.end_now()
    assert read_stop_request(tmp_path) == "end of torchrun"
    assert orders.orphaned_by == launcher
    now[0] += 9.0
    assert not orders.end_now()
    now[0] += 2.0
    assert orders.end_now()
    assert orders.late
    assert capsys.readouterr().err.count("which started this rank, was killed: stopping within 10 s.") == 1


def test_the_time_that_a_request_gave_is_not_cut_when_the_launcher_ends_first(tmp_path: Path) -> None:
    """As Accelerate does at Ctrl-C, while the rank saves."""
    caught = [15]
    orders = Escalation(caught, 600.0, tmp_path, launcher=Launcher("accelerate", 1 << 22, 1), silent=True)
    assert not orders.end_now()
    assert read_stop_request(tmp_path) == "SIGTERM"
    assert orders.orphaned_by is None
