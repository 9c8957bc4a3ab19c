"""Real ranks on this machine, started by dtrain's own launcher, and what their numbers say."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.gpus import Gpus
from dtrain.tools.doctor.words import many, rate, seconds, size

TORCH, REDUCE, COMPUTE, START = "torch", "all-reduce", "compute", "ranks"
GPU = "GPU compute"
_BROKEN = "do not train there: the device is faulty; check dmesg (Xid) and replace it"
_TIMEOUT, _HANG = "30", 45.0
_TIMEOUT_NAME = "DTRAIN_RDZV_TIMEOUT"


def rank_words(out: Path, cpu: bool, *, gpu_too: bool = False) -> list[str]:
    """Returns the words after `dtrain` that make a process measure as one of several ranks."""
    return ["doctor-rank", "--out", str(out), *["--cpu"] * cpu, *["--gpu-too"] * gpu_too]


def check_ranks(ranks: int, gpus: Gpus, *, cpu: bool, gpu_too: bool = False) -> list[Finding]:
    """Starts ranks here, and judges what they measured.

    Args:
        ranks: their number.
        gpus: what nvidia-smi told.
        cpu: whether they compute on the CPU.
        gpu_too: whether one of them tries a GPU all the same.
    """
    from dtrain.launch.supervisor import dtrain_argv, run_local_ranks

    with tempfile.TemporaryDirectory(prefix="dtrain-doctor-") as folder:
        out = Path(folder) / "measured.json"
        said = io.StringIO()  # what ranks print is not for the table, nor for JSON
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ending = run_local_ranks(
                dtrain_argv(rank_words(out, cpu, gpu_too=gpu_too)),
                ranks,
                {_TIMEOUT_NAME: _TIMEOUT},
                relayed=True,
                hang_seconds=_HANG,
            )
        if ending.signal is not None:
            raise KeyboardInterrupt
        if ending.exit_code != 0 or not out.is_file():
            return [failed_start(ranks, ending.text or said.getvalue())]
        return judge(json.loads(out.read_text(encoding="utf-8")), gpus, cpu=cpu)


def failed_start(ranks: int, text: str) -> Finding:
    """Returns what is told where ranks did not come up or did not end well."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    why = (errors or lines or ["they exited without output"])[0]
    again = f"see the full output: dtrain train -n {ranks}, or dtrain check parity -n {ranks} for CPU ranks"
    return Finding(START, "fail", f"{many(ranks, 'rank')} failed to start: {why}", again)


def judge(measured: dict[str, Any], gpus: Gpus, *, cpu: bool) -> list[Finding]:
    """Returns findings from what `collectives.measure` returned."""
    from dtrain.tools.doctor.card import judge_cards

    count = len(measured["ranks"])
    reduces = [judge_reduce(one, count) for one in measured["reduces"]]
    if not reduces:
        reduces = [Finding(REDUCE, "skip", "a single rank has nothing to reduce: use -n 2")]
    alone = [] if measured["gpu"] is None else [judge_gpu(*measured["gpu"])]
    alone += judge_cards(measured.get("cards", []))
    return [judge_torch(measured["torch"], gpus, cpu=cpu), *reduces, judge_compute(measured["ranks"]), *alone]


def judge_torch(facts: dict[str, Any], gpus: Gpus, *, cpu: bool) -> Finding:
    """Compares what torch was built for with what there is."""
    built = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU alone"
    backends = ["gloo"] * facts["gloo"] + [f"NCCL {facts['nccl']}"] * bool(facts["nccl"])
    words = f"{facts['torch']}, built for {built}; backends: {', '.join(backends) or 'none'}"
    if not backends:
        return Finding(TORCH, "fail", words, "install a torch that was built with torch.distributed")
    seen = f"{words}; it sees {facts['gpus']} of {many(gpus.visible, 'GPU')}"
    if not gpus.visible:
        return passed(TORCH, words)
    if facts["gpus"] < gpus.visible:
        cuda = "install a torch that was built for CUDA (https://pytorch.org)"
        remedy = (
            "the driver is too old for this torch, or no GPU is visible: check nvidia-smi" if facts["cuda"] else cuda
        )
        return Finding(TORCH, "warn" if cpu else "fail", seen, f"{remedy}; or train with --cpu")
    return passed(TORCH, seen)


def judge_reduce(one: dict[str, Any], ranks: int) -> Finding:
    """Judges one backend's all-reduce: a wrong sum is a failure."""
    words = f"{one['backend']}, {many(ranks, 'rank')}"
    if one["wrong"]:
        wrong = ", ".join(map(str, one["wrong"]))
        remedy = "do not train here: check dmesg for memory or PCIe errors; with NCCL try NCCL_P2P_DISABLE=1"
        return Finding(REDUCE, "fail", f"{words}: wrong sums on rank {wrong} ({size(one['bytes'])})", remedy)
    return passed(
        REDUCE,
        f"{words}: correct, {rate(one['speed'])} bus bandwidth ({size(one['bytes'])}), "
        f"{seconds(one['latency'])} for 8 numbers",
    )


def judge_compute(ranks: list[Any]) -> Finding:
    """Judges each rank's own matrix products."""
    wrong = [rank for rank, (_, _, _, _, right) in enumerate(ranks) if not right]
    if wrong:
        first = ranks[wrong[0]]
        words = f"a matrix product is wrong on rank {', '.join(map(str, wrong))} ({first[2]} of {first[1]})"
        return Finding(COMPUTE, "fail", words, _BROKEN)
    speeds = [one[3] for one in ranks]
    low, high = min(speeds), max(speeds)
    words = f"{giga(low)} to {giga(high)} GFLOP/s per rank in float32 ({ranks[0][2]})"
    return passed(COMPUTE, words)


def judge_gpu(name: str, speed: float, right: bool) -> Finding:
    """Judges the product of a GPU that one rank tried."""
    if not right:
        return Finding(GPU, "fail", f"a matrix product is wrong on {name}", _BROKEN)
    return passed(GPU, f"{giga(speed)} GFLOP/s in float32 ({name})")


def giga(operations: float) -> str:
    """Returns operations a second in billions, as "95.3"."""
    return f"{operations / 1e9:.3g}" if operations < 1e12 else f"{operations / 1e9:.0f}"
