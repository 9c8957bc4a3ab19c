"""Limits that a machine, a container or a site has set: found, kept to, or named with their remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import Dtrain, clean_environment

from dtrain.errors import WorldError
from dtrain.launch.env import cgroups, limits, threads
from dtrain.launch.env.cgroups import own_folders
from dtrain.launch.env.socket_paths import is_too_long
from dtrain.launch.monitor.describe import explain
from dtrain.launch.monitor.remedies import remedy_of
from dtrain.tools.doctor.cores import check_temporary

LONG = "d" * 100
SOCKETS = (
    "import multiprocessing, os, sys\n"
    "from multiprocessing.connection import Listener\n"
    "from dtrain.launch.env.socket_paths import shorten_socket_paths\n"
    "def open_one(q=None):\n"
    "    with Listener(family='AF_UNIX') as one:\n"
    "        q.put(one.address) if q else print(one.address)\n"
    "if __name__ == '__main__':\n"
    "    if sys.argv[1] == 'shorten': shorten_socket_paths()\n"
    "    open_one()\n"
    "    context = multiprocessing.get_context('spawn')\n"
    "    q = context.SimpleQueue()\n"
    "    p = context.Process(target=open_one, args=(q,)); p.start(); print(q.get()); p.join()\n"
)


def sockets(folder: Path, how: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    (folder / "s.py").write_text(SOCKETS)
    env = clean_environment(TMPDIR=str(temporary))
    return subprocess.run(
        [sys.executable, "s.py", how], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_sockets_of_workers_are_in_a_short_folder_where_tmpdir_is_long(tmp_path: Path) -> None:
    temporary = tmp_path / LONG
    temporary.mkdir()
    assert "AF_UNIX path too long" in sockets(tmp_path, "not", temporary).stderr, "what this is for"
    done = sockets(tmp_path, "shorten", temporary)
    assert done.returncode == 0, done.stderr
    folders = {os.path.dirname(address) for address in done.stdout.split()}  # noqa: PTH120
    assert len(folders) == 1, "of the process and of its worker"
    (folder,) = folders
    assert not is_too_long(os.path.dirname(folder))  # noqa: PTH120
    assert not Path(folder).exists(), "it is removed with the process"
    assert not list(temporary.iterdir())


def test_a_short_tmpdir_is_left_alone(tmp_path: Path) -> None:
    done = sockets(tmp_path, "shorten", Path("/var/tmp"))  # noqa: S108
    assert done.returncode == 0, done.stderr
    assert {line.partition("/pymp-")[0] for line in done.stdout.split()} == {"/var/tmp"}  # noqa: S108


def test_a_run_with_workers_trains_where_tmpdir_is_long(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / LONG).mkdir()
    words = ("train", recipes / "long.py", "--cpu", "epochs=1", "n_train=8", "workers=1", "hang_seconds=20")
    done = dtrain(*words, TMPDIR=str(dtrain.folder / LONG))
    assert done.code == 0, done.text
    assert not list((dtrain.folder / LONG).glob("pymp-*"))


def test_the_doctor_says_what_is_wrong_with_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LONG).mkdir()
    for folder, state, word in (
        (str(tmp_path / LONG), "pass", "too many for sockets, which dtrain makes in /tmp"),
        (str(tmp_path / "missing"), "warn", "in place of TMPDIR="),
        ("/var/tmp", "pass", "free"),  # noqa: S108
    ):
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr("tempfile.tempdir", None)
        found = check_temporary()
        assert (found.state, word in found.measured) == (state, True), found
    monkeypatch.setenv("TMPDIR", str(tmp_path / LONG))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("dtrain.tools.doctor.cores.short_folder", lambda: None)
    assert check_temporary().state == "fail"


@pytest.mark.parametrize(
    ("facts", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "200000 100000"}, 2.0),
        ("0::/job/step\n", {"job/step/cpu.max": "50000 100000", "job/cpu.max": "200000 100000"}, 0.5),
        ("0::/../..\n", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/slurm/job\n3:memory:/x\n",
            {
                "cpu/slurm/job/cpu.cfs_quota_us": "150000",
                "cpu/slurm/job/cpu.cfs_period_us": "100000",
                "cpu/slurm/cpu.cfs_quota_us": "-1",
                "cpu/slurm/cpu.cfs_period_us": "100000",
            },
            1.5,
        ),
    ],
)
def test_the_tightest_quota_of_nested_control_groups_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: str, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(facts)
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "cgroup")
    assert threads.cgroup_quota() == expected
    assert own_folders("cpu"), "at least the top"


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_123_456_0>: No space left on device (28)",
        "unable to mmap 400 bytes from file </torch_1_2_3>: Cannot allocate memory (12)",
        "[Errno 28] No space left on device: '/dev/shm/sem.mp-x'",
    ],
)
def test_the_failure_screen_names_the_remedy_of_small_shared_memory(tmp_path: Path, text: str) -> None:
    told = explain(RuntimeError(text)).text
    assert "docker run --shm-size=8g (or --ipc=host)" in told
    assert "MiB" in told
    assert "is not there" in remedy_of(text, tmp_path / "none")


@pytest.mark.parametrize("text", ["No space left on device", "mat1 and mat2 shapes cannot be multiplied", ""])
def test_other_failures_get_no_remedy_of_these(text: str) -> None:
    assert remedy_of(text) == ""


def test_the_limit_of_open_files_is_raised_as_far_as_needed_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    resource = limits.resource
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: set_to.append(both))
    limits.allow_open_files(1000, "--nodes 2")
    limits.allow_open_files(2256, "--nodes 1000")
    assert set_to == [(2256, 4096)]
    with pytest.raises(WorldError, match=r"--nodes 9000 needs 18256 open files .* 4096 at most \(ulimit -Hn\)"):
        limits.allow_open_files(18256, "--nodes 9000")
