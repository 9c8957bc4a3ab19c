"""Two virtual hosts train while a process on one of them, which does not know the secret, attacks the job's ports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import pandas as pd
import psutil
import pytest
from helpers.commands import Dtrain, clean_environment
from helpers.hosts import Host, missing, two_hosts

from dtrain import read_history

PORT = 29517
# It tells where the store is, and waits so that the attack comes while the ranks are at work.
RECIPE = """
import os, pathlib, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model(hidden: int = 4):
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))

def build_dataloaders(token: str = "", batch_size: int = 4):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)

def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)

def train_step(model, x, y):
    here = pathlib.Path("port-" + os.environ["RANK"])
    if not here.exists():
        secrets = sorted(name for name in os.environ if "SECRET" in name or name == "DTRAIN_JOB_KEY")
        here.with_suffix(".part").write_text(" ".join([os.environ["MASTER_PORT"], str(os.getpid()), *secrets]))
        here.with_suffix(".part").rename(here)
        deadline = time.monotonic() + 90
        while not pathlib.Path("go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    loss = ((model(x) - y) ** 2).mean()
    return loss, loss.detach().sqrt()

def valid_step(model, x, y):
    loss = ((model(x) - y) ** 2).mean()
    return loss, loss.sqrt()
"""
WORDS = ("train", "r.py", "epochs=3", "run.name=r", "data.token=hush-hush")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    lack = missing()
    if lack:
        pytest.skip(lack)
    with two_hosts(tmp_path) as made:
        yield made


def waited_for(condition: Callable[[], bool], processes: list[subprocess.Popen[str]], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [one for one in processes if one.poll() is not None]
        assert time.monotonic() < deadline and not ended, [one.communicate()[0] for one in ended]
        time.sleep(0.05)


def told(path: Path) -> list[str]:
    return path.read_text().split()


def attacker(host: Host, target: Host) -> subprocess.Popen[str]:
    script = Path(helpers.__file__).parent / "attacker.py"
    ip = shutil.which("ip") or "ip"
    return subprocess.Popen(
        [ip, "netns", "exec", host.name, sys.executable, str(script), target.address, str(PORT)],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def report(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def nothing_is_learnt(heard: list[str]) -> bool:
    """Whether answers hold nothing but random digits and a proof that serves nobody."""
    return all(not one or re.fullmatch(r'\{"nonce": "[0-9a-f]{32}", "proof": "[0-9a-f]{64}"\}\n', one) for one in heard)


def test_two_nodes_under_attack_finish_with_the_history_of_two_ranks_here(hosts: list[Host], dtrain: Dtrain) -> None:
    first, second = hosts
    secret = first.folder.parent / "secret"
    secret.write_text("5d" * 16)
    secret.chmod(0o600)
    for folder in (first.folder, second.folder, dtrain.folder):
        (folder / "r.py").write_text(RECIPE)
    options = ("-n", 1, "--nodes", 2, "--rdzv", f"{first.address}:{PORT}", "--rdzv-secret-file", secret, "--cpu")
    launchers = [first.start("launch", "--node-rank", 0, *options, "--", *WORDS)]
    enemy = None
    try:
        waited_for(lambda: listens(first), launchers)
        enemy = attacker(second, first)
        before = report(enemy)  # while the first node waits for the other
        launchers.append(second.start("launch", "--node-rank", 1, *options, "--", *WORDS))
        waited_for(lambda: (first.folder / "port-0").exists() and (second.folder / "port-1").exists(), launchers)
        assert enemy.stdin is not None
        store = told(first.folder / "port-0")[0]
        enemy.stdin.write(f"{store}\n")
        enemy.stdin.flush()
        during = report(enemy)  # while the ranks are at work
        for host in hosts:
            (host.folder / "go").touch()
        enemy.stdin.write(f"{store}\n")
        enemy.stdin.flush()
        texts = [one.communicate(timeout=120)[0] for one in launchers]
    finally:
        for process in (*launchers, *([enemy] if enemy else [])):
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
    assert [one.returncode for one in launchers] == [0, 0], texts

    assert nothing_is_learnt([*before["heard"], *during["heard"]])
    assert before["known"] is False
    assert during["store"] is None, "the ranks' store is for those who know the secret"
    warnings = [line for line in texts[0].splitlines() if "warning" in line]
    assert len(warnings) == len(set(warnings)) <= 8, "one of each kind and port"
    assert "without a secret" not in texts[0]
    for host, rank in zip(hosts, "01", strict=True):
        assert len(told(host.folder / f"port-{rank}")) == 2, "a secret is left in the rank's environment"

    (local,) = here(dtrain)
    timed = ["seconds", "samples_per_second"]
    frames = [read_history(folder / "runs" / "r").drop(columns=timed) for folder in (first.folder, local)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-9)


def listens(host: Host) -> bool:
    ip = shutil.which("ip") or "ip"
    table = subprocess.run(
        [ip, "netns", "exec", host.name, "cat", "/proc/net/tcp"], check=True, capture_output=True, text=True
    ).stdout
    return f":{PORT:04X} 00000000:0000 0A" in table


def here(dtrain: Dtrain) -> Iterator[Path]:
    """Trains on two ranks of this machine, and looks at where they listen meanwhile."""
    process = dtrain.start(*WORDS, "-n", 2, "--cpu")
    try:
        waited_for(lambda: all((dtrain.folder / f"port-{rank}").exists() for rank in "01"), [process])
        addresses = {
            one.laddr.ip
            for rank in "01"
            for one in psutil.Process(int(told(dtrain.folder / f"port-{rank}")[1])).net_connections("tcp")
            if one.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1"}, "ranks of one machine listen for nobody else"
        (dtrain.folder / "go").touch()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    yield dtrain.folder
