"""What `dtrain doctor` says of one machine, with a fault put into each thing that it looks at."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import clean_environment
from typer.testing import CliRunner

from dtrain.checkpoint.writer import fits_on_disk
from dtrain.cli.app import app
from dtrain.errors import WorldError
from dtrain.tools.doctor import card, cluster, cores, folder, gpus, network, ranks, versions
from dtrain.tools.doctor.finding import Finding, State, guarded, passed
from dtrain.tools.doctor.report import json_text, lines_of, summary


def has(found: Finding, state: State, words: str = "", remedy: str = "") -> None:
    assert (found.state, words in found.measured, remedy in found.remedy) == (state, True, True), found
    assert bool(found.remedy) == (state in ("warn", "fail")), found


@pytest.mark.parametrize(
    ("count", "env", "state", "words", "remedy"),
    [
        (2, {}, "pass", "2 ranks, 2 threads each", ""),
        (2, {"OMP_NUM_THREADS": "2"}, "pass", "OMP_NUM_THREADS=2", ""),
        (2, {"OMP_NUM_THREADS": "64"}, "warn", "128 threads on 4 cores", "set it to 2"),
        (1, {"OMP_NUM_THREADS": "many"}, "warn", "OMP_NUM_THREADS=many", "unset OMP_NUM_THREADS"),
        (5, {}, "warn", "5 ranks", "start fewer ranks"),
        (5, {"SLURM_JOB_ID": "1"}, "warn", "5 ranks", "--cpus-per-task=5"),
        (2, {"OMP_PROC_BIND": "true"}, "warn", "bound to the same cores", "unset OMP_PROC_BIND"),
        (1, {"OMP_PROC_BIND": "true"}, "pass", "", ""),
    ],
)
def test_cores_and_threads(
    monkeypatch: pytest.MonkeyPatch, count: int, env: dict[str, str], state: State, words: str, remedy: str
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    has(cores.check_cores(count, env), state, words, remedy)


def test_cores_that_this_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "bound to 0-2,5" in cores.check_cores(1, {}).measured


def test_memory_of_the_tightest_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has(cores.check_memory(1), "pass", "free of")
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{900 << 20}\n")
    monkeypatch.setattr("dtrain.launch.env.memory.own_folders", lambda _: [tmp_path])
    has(cores.check_memory(1), "warn", "124 MiB left of this cgroup's 1 GiB", "request more memory")
    assert fits_on_disk({"a": torch.empty(60 << 20, dtype=torch.uint8, device="meta")})
    assert not fits_on_disk({"a": torch.empty(64 << 20, dtype=torch.uint8, device="meta")}), "more than half of it"


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has(cores.check_shared_memory(tmp_path), "pass" if free(tmp_path) > 1 << 30 else "warn", "free of")
    assert list(tmp_path.iterdir()) == []
    has(cores.check_shared_memory(tmp_path / "none"), "warn", "there is no", "mount a tmpfs")
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    has(cores.check_shared_memory(tmp_path), "fail", "16 MiB cannot be allocated")
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EACCES))
    has(cores.check_shared_memory(tmp_path), "fail", "Permission denied", "chmod 1777")


def free(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_run_folder_that_is_well_is_left_as_it_was(tmp_path: Path) -> None:
    runs = tmp_path / "not" / "there" / "yet"
    room, speed, locks = folder.check_folder(runs)
    assert room.state in ("pass", "warn")
    assert (speed.name, "synced" in speed.measured) == ("disk speed", True)
    has(locks, "pass", "excludes a second process")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = folder.check_folder(tmp_path / "file" / "runs")
    has(found, "fail", "not a directory", "run.dir=FOLDER")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = list(os.statvfs(tmp_path))

    def of(free_blocks: int, free_files: int) -> Callable[[object], os.statvfs_result]:
        return lambda _: os.statvfs_result([*real[:4], free_blocks, real[5], real[6], free_files, *real[8:10]])

    for free_blocks, free_files, state, words in (
        (1, 1000, "fail", "too little space for checkpoints"),
        ((1 << 30) // real[1], 1000, "warn", "1 GiB free"),
        (1 << 40, 0, "fail", "inodes"),
    ):
        monkeypatch.setattr(os, "statvfs", of(free_blocks, free_files))
        has(folder.check_folder(tmp_path)[0], state, words, "run.dir=FOLDER")


def test_a_slow_disk_and_one_that_a_quota_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "measure_writes", lambda _: folder.WriteSpeed(5e6, 0.4))
    has(folder.check_folder(tmp_path)[1], "warn", "5 MB/s synced, 4e+02 ms", "save less often")
    monkeypatch.setattr(folder, "measure_writes", failing(errno.EDQUOT))
    has(folder.check_folder(tmp_path)[1], "fail", "quota", "quota")


def test_file_systems_without_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    has(folder.check_folder(tmp_path)[2], "warn", "has no locks", "heartbeats")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    has(folder.check_folder(tmp_path)[2], "warn", "does not exclude a second process", "mount")


def test_the_kind_of_a_file_system() -> None:
    assert folder.file_system(Path("/proc/self")) == "proc"


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    has(network.check_port(), "pass", "opened and reached")

    def refuse(*_: object) -> socket.socket:
        raise WorldError("port 5 cannot be opened: Operation not permitted.")

    monkeypatch.setattr(network, "listen_on", refuse)
    has(network.check_port(), "fail", "not permitted", "firewall")


def test_a_host_name_that_leads_nowhere_or_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    has(network.check_host_name(unknown), "warn", "Name or service not known", "/etc/hosts")
    monkeypatch.setattr(network, "is_own_address", lambda _: False)
    monkeypatch.setattr(network, "_addresses", lambda _: "192.0.2.7")
    found = network.check_host_name(lambda *_, **__: None)
    has(found, "warn", "192.0.2.7, which is not an address of this machine", "fix /etc/hosts")


def test_a_name_server_that_does_not_answer_is_not_waited_for() -> None:
    never = threading.Event()
    with pytest.raises(network.LateError, match=r"no answer within 0\.05 s"):
        network.bounded(lambda: never.wait(30), 0.05)
    never.set()


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_wandb_is_never_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as url:
        has(network.check_wandb({"WANDB_BASE_URL": url}), "pass", "answered 200")
    has(network.check_wandb({"WANDB_BASE_URL": url}), "warn", "Connection refused", "track.wandb.mode=offline")
    with monkeypatch.context() as patch:  # named nowhere, it is the server that wandb would use
        patch.setattr("wandb.Settings", lambda: SimpleNamespace(base_url=url))
        has(network.check_wandb({}), "warn", url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        has(network.check_wandb({"WANDB_BASE_URL": url}, 0.1), "warn", "no answer within 0.1 s", "offline")
    has(network.check_wandb({"WANDB_MODE": "offline"}), "skip", "offline")


def test_variables_that_were_left_in_the_shell() -> None:
    has(cluster.check_environment({}), "pass")
    has(cluster.check_environment({"NCCL_DEBUG": "INFO"}), "pass", "NCCL_DEBUG=INFO")
    has(cluster.check_environment({"RANK": "1", "WORLD_SIZE": "2"}), "warn", "RANK=1", "unset RANK WORLD_SIZE")
    has(cluster.check_environment({"GLOO_SOCKET_IFNAME": "nope9"}), "fail", "nope9", "unset GLOO_SOCKET_IFNAME")
    has(cluster.check_environment({"NCCL_SOCKET_IFNAME": "^docker,lo"}), "pass")


TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "4",
    "SLURMD_NODENAME": socket.gethostname(),
}


@pytest.mark.parametrize(
    ("more", "nodes", "per_node", "state", "words"),
    [
        ({}, 2, 4, "pass", "task 1 of 2 on n[1-2], 4 CPUs, 4 ranks"),
        ({}, 3, 4, "fail", "expected 3"),
        ({}, 2, 8, "warn", "8 ranks"),
        ({"SLURMD_NODENAME": "other"}, 2, 1, "warn", "SLURM calls this node other"),
    ],
)
def test_a_steps_variables(more: dict[str, str], nodes: int, per_node: int, state: State, words: str) -> None:
    has(cluster.check_task(nodes, per_node, {**TASK, **more}), state, words)
    has(cluster.check_task(nodes, per_node, {"SLURM_JOB_ID": "7"}), "fail", "SLURM_PROCID")


def test_states_of_nodes() -> None:
    up = "n1|idle|none\nn2|mixed|none\nn2|mixed|none\nn3|allocated|none\n"
    has(cluster.judge_nodes(up), "pass", "3 of 3 up: 1 idle, 1 mixed, 1 allocated")
    down = "n1|idle|none\nn2|idle*|none\nn3|drained|broken | fan\n"
    has(cluster.judge_nodes(down), "warn", "1 of 3 up: 2 idle, 1 drained; n2 is idle*; n3 is drained (broken | fan)")
    has(cluster.judge_nodes("n1|down*|Not responding\n"), "fail", "0 of 1 up")


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_partitions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = (
        'case "$*" in --version) echo slurm 99;; *-N*) echo "n1|idle|none";; *) '
        'echo "gpu*|up|1-00:00:00|1:00:00|1-4|8|64|512000|gpu:8"; echo "old|down|infinite|n/a|1-infinite|2|8+|1+|(null)";; esac'
    )
    program(tmp_path, "sinfo", case, monkeypatch)
    version, first, second, nodes = cluster.check_slurm()
    has(version, "pass", "slurm 99")
    has(first, "pass", "8 nodes of 64 CPUs, 500 GiB, gpu:8, time limit 1-00:00:00, default 1:00:00")
    assert (first.name, second.name) == ("partition gpu", "partition old")
    has(second, "warn", "down: 2 nodes of 8+ CPUs", "another partition")
    has(nodes, "pass", "1 of 1 up")
    program(tmp_path, "sinfo", "echo first; echo 'sinfo: fatal: no answer' >&2; exit 1", monkeypatch)
    (found,) = cluster.check_slurm()
    has(found, "warn", "sinfo: fatal: no answer", "scontrol ping")


SMI = 'case "$1" in -L) echo "GPU 0: x"; echo "GPU 1: x";; *) {};; esac'
ROW = "echo 'NVIDIA H100, 550.54, 81559, {}, {}'"


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free_one, busy, barred = (
        ROW.format(*cells) for cells in (("4", "Default"), ("40000", "Default"), ("4", "Prohibited"))
    )
    for rows, env, state, words in (
        (f"{free_one}; {free_one}", {}, "pass", "2 x NVIDIA H100, driver 550.54"),
        (f"{free_one}; {busy}", {}, "warn", "in use already: GPU 1: 39.1 GiB of 79.6 GiB"),
        (f"{free_one}; {barred}", {}, "fail", "GPU 1 is in compute mode"),
        (f"{free_one}; {free_one}", {"CUDA_VISIBLE_DEVICES": "1"}, "pass", "1 visible"),
        (f"{free_one}; {free_one}", {"CUDA_VISIBLE_DEVICES": ""}, "warn", "0 visible"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", {}, "fail", "mismatch"),
    ):
        program(tmp_path, "nvidia-smi", SMI.format(rows), monkeypatch)
        has(gpus.check_gpus(gpus.find_gpus(env), env), state, words)


FACTS = {"torch": "2.13", "cuda": "", "hip": "", "nccl": "", "gloo": True, "gpus": 0, "threads": 1}


def test_torch_against_what_is_there() -> None:
    none, two = gpus.Gpus(), gpus.Gpus(visible=2)
    has(ranks.judge_torch(FACTS, none, cpu=True), "pass", "built for CPU alone; backends: gloo")
    has(ranks.judge_torch(FACTS, two, cpu=False), "fail", "0 of 2 GPUs", "built for CUDA")
    has(ranks.judge_torch(FACTS, two, cpu=True), "warn", "0 of 2 GPUs", "--cpu")
    cuda = {**FACTS, "cuda": "12.8", "nccl": "2.27.3"}
    has(ranks.judge_torch(cuda, two, cpu=False), "fail", "NCCL 2.27.3", "driver is too old")
    has(ranks.judge_torch({**cuda, "gpus": 2}, two, cpu=False), "pass", "2 of 2 GPUs")
    has(ranks.judge_torch({**FACTS, "gloo": False}, none, cpu=True), "fail", "backends: none")


def test_ranks_that_compute_wrongly_are_named() -> None:
    one = {"backend": "gloo", "bytes": 1 << 24, "wrong": [], "speed": 1.5e9, "latency": 2e-4}
    has(ranks.judge_reduce(one, 4), "pass", "correct, 1.5 GB/s bus bandwidth (16 MiB), 0.2 ms for 8 numbers")
    has(ranks.judge_reduce({**one, "wrong": [1, 3]}, 4), "fail", "wrong sums on rank 1, 3", "do not train")
    well, ill = [0, "n1", "cpu", 5e10, True], [1, "n2", "cpu", 5e10, False]
    has(ranks.judge_compute([well, ill]), "fail", "wrong on rank 1 (cpu of n2)", "do not train")
    has(ranks.judge_gpu("H100", 5e13, True), "pass", "50000 GFLOP/s in float32 (H100)")
    has(ranks.judge_gpu("H100", 5e13, False), "fail", "wrong on H100", "do not train")


def test_packages_that_are_missing_or_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    has(versions.check_versions(), "pass", "torch 2.")
    monkeypatch.setattr(versions, "unmet", lambda: [("torch", ">=2.10", "2.9")])
    has(versions.check_versions(), "warn", "torch>=2.10 (is 2.9)", "pip install 'torch>=2.10'")
    monkeypatch.setattr(versions, "unmet", lambda: [("wandb", ">=0.19", "")])
    has(versions.check_versions(), "fail", "missing: wandb>=0.19", "pip install 'wandb>=0.19'")


def test_a_check_that_cannot_be_made_is_a_failure_and_the_others_go_on() -> None:
    has(guarded("x", failing(errno.EPERM)), "fail", "Operation not permitted")
    has(guarded("x", lambda: passed("x", {}["y"])), "fail", "KeyError: 'y'")


def test_report() -> None:
    found = [Finding("a", "pass", "one"), Finding("long name", "warn", "two", "do it"), Finding("c", "skip", "none")]
    assert lines_of(found[1], 9) == ["warn  long name  two", "                 remedy: do it"]
    assert summary(found) == "1 passed, 1 warning, 0 failed, 1 skipped"
    told = json.loads(json_text(found))
    assert (told["worst"], told["exit_code"], told["findings"][1]["remedy"]) == ("warn", 0, "do it")


@pytest.mark.parametrize(("state", "code"), [("pass", 0), ("skip", 0), ("warn", 0), ("fail", 1)])
def test_exit_code_says_whether_a_check_failed(monkeypatch: pytest.MonkeyPatch, state: State, code: int) -> None:
    monkeypatch.setattr("dtrain.tools.doctor.local.check_machine", lambda _: [Finding("a", state, "b", "c")])
    done = CliRunner().invoke(app, ["doctor"])
    assert (done.exit_code, "remedy: c" in done.output) == (code, True), done.output


def test_nothing_loads_torch_but_the_ranks() -> None:
    names = ["local", "report", "ranks", "nodes.whole", "nodes.host", "nodes.task", "nodes.verdict"]
    code = f"import sys\nfor n in {names}: __import__('dtrain.tools.doctor.' + n)\nprint('torch' in sys.modules)"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=clean_environment(), timeout=120)
    assert done.stdout == "False\n"


CARD = {"bf16": 7.2e14, "pageable": 9e9, "pinned": 5.2e10, "within": 4.1e12}


def test_a_card_is_compared_with_what_it_is_known_for() -> None:
    well = card.judge_card("NVIDIA H200", CARD)
    has(well, "pass", "NVIDIA H200: 720 TFLOP/s in bf16 (73% of its 989 TFLOP/s)")
    assert "52 GB/s pinned, 9 GB/s pageable" in well.measured
    assert "within it: 4.1 TB/s (85% of its 4.8 TB/s)" in well.measured
    has(card.judge_card("NVIDIA H200", {**CARD, "bf16": 4e14}), "warn", "40%", "throttled")
    has(card.judge_card("NVIDIA H200", {**CARD, "within": 2e12}), "warn", "42%", "ECC")
    has(card.judge_card("NVIDIA H200", {**CARD, "pinned": 5e9}), "warn", "5 GB/s pinned", "PCIe link")
    has(card.judge_card("Unknown 1", {**CARD, "bf16": 1e12}), "pass", "1 TFLOP/s in bf16; copies")
    slow = ["n2", "NVIDIA H200", {**CARD, "bf16": 6e14}]
    (found,) = card.judge_cards([["n1", "NVIDIA H200", CARD], slow, None])
    has(found, "pass", "NVIDIA H200 (rank 1 of n2, the slowest of 2): 600 TFLOP/s")


def test_the_same_measurements_on_the_cpu() -> None:
    waits = []
    bench = card.Bench(torch.device("cpu"), 32, 1 << 12, lambda: waits.append(1), pins=False)
    found = card.measure_card(bench)
    assert found.keys() == {"bf16", "pageable", "within"}
    assert min(found.values()) > 0
    assert len(waits) >= 18
