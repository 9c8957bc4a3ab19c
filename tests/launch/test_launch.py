"""`dtrain launch` runs any script as ranks, and says how it ended."""

from __future__ import annotations

import pytest
from helpers.commands import Dtrain

PLAIN = """
import os, sys, threads
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {sys.argv[1:]} {__name__} {threads.OWN} {'torch' in sys.modules}")
"""


def script(dtrain: Dtrain, text: str) -> None:
    (dtrain.folder / "mine").mkdir()
    (dtrain.folder / "mine" / "threads.py").write_text("OWN = 'own'")  # named like a module of dtrain's
    (dtrain.folder / "mine" / "script.py").write_text(text)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_plain_script_runs_as_python_would_run_it(dtrain: Dtrain, ranks: int) -> None:
    script(dtrain, PLAIN)
    done = dtrain("launch", "-n", ranks, "--", "mine/script.py", "-n", 7, "--cpu")
    assert done.code == 0, done.text
    lines = sorted(done.out.splitlines())
    assert lines == [f"rank {r} of {ranks}: ['-n', '7', '--cpu'] __main__ own False" for r in range(ranks)]
    assert done.err == ""


ENDS = {
    "exit 3": ("import sys; sys.exit(3)", 3, "the script ended with exit code 3 on rank 1."),
    "exit 0": ("import sys; sys.exit(0)", 0, ""),
    "message": ("import sys; sys.exit('no data')", 1, "no data\ndtrain: error: the script called sys.exit()"),
    "exception": ("raise ValueError('a fault')", 1, "ValueError: a fault"),
    "silent": ("import os; os._exit(0)", 1, "rank 1 exited with code 0 without reporting a cause"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "rank 1 was killed by SIGKILL"),
    "dtrain's": ("import dtrain; dtrain.Meter().add()", 2, "script.py:4"),
}


@pytest.mark.parametrize("end", ENDS)
def test_one_rank_that_ends_ends_all(dtrain: Dtrain, end: str) -> None:
    statement, code, told = ENDS[end]
    # All goes well where rank 1 ends well; else rank 0 would wait for ever.
    wait = "" if code == 0 else "else:\n    import time\n    time.sleep(600)\n"
    script(dtrain, f"import os\n\nif os.environ['RANK'] == '1':\n    {statement}\n{wait}")
    done = dtrain("launch", "-n", 2, "mine/script.py")
    assert done.code == code, done.text
    assert told in done.err
    assert "runpy" not in done.err
    if end == "exception":
        assert 'script.py", line 4, in <module>' in done.err
        assert "raised by your code" in done.err
        assert "at rank 1" in done.err


def test_what_cannot_be_started_is_told_before_anything_starts(dtrain: Dtrain) -> None:
    script(dtrain, "def broken(:\n")
    missing = dtrain("launch", "-n", 2, "mine/scrip.py")
    assert missing.code == 2
    assert "mine/scrip.py: no such file" in missing.err
    assert "Did you mean 'script.py'?" in missing.err
    syntax = dtrain("launch", "-n", 2, "mine/script.py")
    assert syntax.code == 2
    assert "mine/script.py:1: syntax error" in syntax.err
    verb = dtrain("launch", "-n", 2, "tran")
    assert verb.code == 2
    assert "Did you mean 'train'?" in verb.err
    recipe = dtrain("launch", "-n", 2, "train", "mine/none.py")
    assert recipe.code == 2
    assert "mine/none.py: no such file" in recipe.err
    nested = dtrain("launch", "mine/threads.py", RANK="0", WORLD_SIZE="2")
    assert nested.code == 2
    assert "rank 0 of 2 already" in nested.err


DISTRIBUTED = """
import multiprocessing, sys, torch, torch.distributed as dist
from torch.utils.data import DataLoader

class Squares:
    def __len__(self): return 4
    def __getitem__(self, i): return torch.tensor(float(i * i))

if __name__ == "__main__":
    dist.init_process_group("gloo")
    loader = DataLoader(Squares(), 2, num_workers=1, multiprocessing_context="spawn")
    total = sum(batch.sum() for batch in loader) + dist.get_rank()
    dist.all_reduce(total)
    print("sum", total.item(), torch.cuda.is_available(), flush=True)
    if sys.argv[1:] == ["close"]:
        dist.destroy_process_group()
"""


@pytest.mark.parametrize("words", [["close"], []])
def test_a_script_with_torch_distributed_of_its_own(dtrain: Dtrain, words: list[str]) -> None:
    script(dtrain, DISTRIBUTED)
    done = dtrain("launch", "-n", 2, "--cpu", "--", "mine/script.py", *words)
    assert done.code == 0, done.text
    assert done.out.splitlines() == ["sum 29.0 False"] * 2
    assert "terminate called" not in done.err


ONCE = """
import os, pathlib, sys
tried = pathlib.Path(f"tried-{os.environ['RANK']}")
tried.write_text(tried.read_text() + "x" if tried.exists() else "x")
print("attempt", len(tried.read_text()), os.environ["MASTER_PORT"], os.environ["DTRAIN_JOB"], flush=True)
if len(tried.read_text()) <= int(sys.argv[1]) and os.environ["RANK"] == "1":
    raise ValueError("a fault")
"""


ALONE = """
import torch
from torch import nn

net = nn.Linear(1, 1)
optimizer = torch.optim.AdamW(net.parameters())
net(torch.ones(1, 1)).sum().backward()
optimizer.step()
"""


def test_ranks_that_each_train_alone_are_told_of(dtrain: Dtrain) -> None:
    script(dtrain, ALONE)
    done = dtrain("launch", "-n", 2, "--cpu", "mine/script.py")
    assert done.code == 0, done.text
    assert done.err.count("dtrain: warning: 2 processes each ran the whole script independently") == 1
    assert "call dtrain.prepare(...)" in done.err
    assert not dtrain("launch", "-n", 1, "--cpu", "mine/script.py").err


EARLY = """
import torch
from torch import nn
from torch.utils.data import DataLoader

import dtrain

net, loader = dtrain.prepare(nn.Linear(1, 1), DataLoader(torch.ones(8, 1), batch_size=2), cpu=True)
for epoch in range(2):
    if not dtrain.is_main():
        continue
    for x in loader:
        net(x).sum().backward()
"""


def test_a_rank_that_ended_its_script_early_is_named(dtrain: Dtrain) -> None:
    script(dtrain, EARLY)
    done = dtrain("launch", "-n", 2, "--cpu", "mine/script.py")
    assert done.code == 1, done.text
    assert (
        "dtrain: error: rank 1 had finished the script (exit code 0) while rank 0 was in epoch 1, waiting for all ranks."
        in done.err
    )
    assert "Every rank must run the whole script" in done.err
    assert "raised by your code" not in done.err


@pytest.mark.parametrize(("faults", "code"), [(1, 0), (2, 1)])
def test_retries_start_all_again(dtrain: Dtrain, faults: int, code: int) -> None:
    script(dtrain, ONCE)
    done = dtrain("launch", "-n", 2, "--retries", 1, "mine/script.py", faults)
    assert done.code == code, done.text
    assert (dtrain.folder / "tried-1").read_text() == "xx"
    assert done.err.count("ValueError: a fault") == faults
    assert "dtrain: attempt 1 failed; retrying in 1 s." in done.err
    assert ("giving up after 2 failures without progress" in done.err) == (code == 1)
    jobs = {line.split()[3] for line in done.out.splitlines()}
    assert len(jobs) == 2, "each attempt is a job of its own"


def test_a_script_that_stands_still_is_ended_where_that_is_asked_for(dtrain: Dtrain) -> None:
    work = "end = time.monotonic() + 4\nwhile time.monotonic() < end: pass\n"
    script(dtrain, f"import os, time\n{work}if os.environ['RANK'] == '1':\n    time.sleep(600)\n")
    done = dtrain("launch", "-n", 2, "--hang-seconds", 2, "mine/script.py")
    assert done.code == 76, done.text
    assert "a hang was stopped: rank 1 has been in script for" in done.err  # and not while it worked
    assert "script.py:5, in <module>" in done.err


PREPARED = """
import time, torch, dtrain
from torch.utils.data import DataLoader, TensorDataset

net = torch.nn.Linear(1, 1)
net, loader = dtrain.prepare(net, DataLoader(TensorDataset(torch.ones(16, 1)), 2))
for epoch in (1, 2):
    for step, (x,) in enumerate(loader, 1):
        net(x).sum().backward()
        if (dtrain.rank(), epoch, step) == (1, 2, 3):
            time.sleep(600)
"""


def test_a_loop_over_a_prepared_loader_is_watched_step_by_step(dtrain: Dtrain) -> None:
    script(dtrain, PREPARED)
    done = dtrain("launch", "-n", 2, "--cpu", "--hang-seconds", 2, "mine/script.py")
    assert done.code == 76, done.text
    assert "a hang was stopped: rank 1 has been in epoch 2, train step 3 for" in done.err
    assert "the others: rank 0: in epoch 2, train step" in done.err


LIMIT = """
import os, torch, torch.distributed as dist
from dtrain.distributed.world import bring_up

world = bring_up()
backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
print(world.all_reduce([1.0]), backend.options._timeout.total_seconds(), flush=True)
"""


@pytest.mark.parametrize(
    ("words", "seconds"), [((), 1800), (("--hang-seconds", 600), 12000), (("--hang-seconds", 0), 2073600)]
)
def test_torchs_own_limit_leaves_hangs_to_the_watch(dtrain: Dtrain, words: tuple[object, ...], seconds: int) -> None:
    """Else it would end a rank that may still be late, and name nobody; what is not watched keeps it."""
    script(dtrain, LIMIT)
    done = dtrain("launch", "-n", 2, "--cpu", *words, "mine/script.py")
    assert done.out.splitlines() == [f"[2.0] {seconds}.0"] * 2, done.text
