"""What the tests start warm is what a user starts: all that a process can see of itself is the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import warm
from helpers.commands import BIN, MARK, clean_environment, is_warm, warm_for_scripts
from helpers.running import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="made of what Linux alone has")

# Of a recipe, which a rank imports.
LOOKS = """
import __main__, atexit, gc, json, locale, multiprocessing, os, random, resource, signal, sys, threading
from pathlib import Path

import numpy
import torch
from small import *

RANK = os.environ.get("RANK", "alone")
DIFFERS = ("MASTER_PORT", "DTRAIN_", "PYTEST_")  # in any two starts


def words(path):
    return Path(path).read_bytes().decode().split("\\0")


def kept(environment):
    return {name: value for name, value in environment.items() if not name.startswith(DIFFERS)}


def status(*names):
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: value.split() for name, _, value in lines if name in names}


def stream(one):
    text = [one.name, one.mode, one.encoding, one.errors, one.line_buffering, one.write_through]
    return [one.fileno(), *text, one.isatty(), str(one.newlines), type(one).__name__, os.readlink(f"/proc/self/fd/{one.fileno()}")[:5]]


seen = {
    "argv": [sys.argv, sys.orig_argv, words("/proc/self/cmdline")],
    "name": Path("/proc/self/comm").read_text(),
    "main": [__main__.__name__, __main__.__file__, str(__main__.__spec__), __main__.__package__],
    "path": sys.path,
    "folder": [os.getcwd(), multiprocessing.process.ORIGINAL_DIR],
    "environment": kept(os.environ),
    "shown environment": kept(dict(line.split("=", 1) for line in words("/proc/self/environ") if line)),
    "flags": [str(sys.flags), sys.warnoptions, str(__import__("warnings").filters[-8:])],
    "streams": [stream(one) for one in (sys.__stdin__, sys.__stdout__, sys.__stderr__)],
    "signals": status("SigBlk", "SigIgn", "Umask", "CapEff"),
    "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "limits": [str(resource.getrlimit(getattr(resource, name))) for name in dir(resource) if name.startswith("RLIMIT_")],
    "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
    "main thread": threading.current_thread() is threading.main_thread(),
    "modules": sorted(name for name in sys.modules if name.startswith(("dtrain", "torch._dynamo", "wandb"))),
    "locale": locale.setlocale(locale.LC_ALL),
    "handlers": [
        getattr(one, "__qualname__", str(one))
        for one in map(signal.getsignal, (signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE))
    ],
}
draws = [] if "word" not in sys.argv else [torch.initial_seed(), random.random(), numpy.random.random()]
Path(f"seen-{RANK}.json").write_text(json.dumps([seen, draws, os.getppid(), gc.get_freeze_count() > 0]))
atexit.register(lambda: Path(f"ended-{RANK}").touch())
"""


@pytest.fixture
def folder(tmp_path: Path, recipes: Path) -> Path:
    (tmp_path / "small.py").write_text((recipes / "small.py").read_text())
    (tmp_path / "looks.py").write_text(LOOKS)
    return tmp_path


def start(kind: type[subprocess.Popen[Any]], folder: Path, *words: object, **how: Any) -> subprocess.Popen[Any]:
    assert is_warm() and warm.Popen.warm is not None
    assert warm.Popen.warm.unsuited(clean_environment()) == set()
    argv = [*([] if words[0] == sys.executable else [str(BIN / "dtrain")]), *map(str, words)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return kind(argv, cwd=folder, env=clean_environment(), **streams, **how)


def seen(kind: type[subprocess.Popen[Any]], folder: Path, *words: object, ranks: tuple[str, ...], **how: Any) -> Any:
    """What each rank saw of itself, and how the command ended."""
    with start(kind, folder, *words, **how) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    found, freezes, draws = [], [], []
    for rank in ranks:
        what, drawn, parent, frozen = json.loads((folder / f"seen-{rank}.json").read_text())
        freezes.append(frozen)
        by_the_test = rank == "alone" and words[0] != "train"  # whose only rank has a supervisor
        assert parent == (psutil.Process().pid if by_the_test else process.pid)
        (folder / f"ended-{rank}").unlink()
        found.append(what)
        draws += drawn
    assert freezes == [kind is not subprocess.Popen] * len(ranks)
    return found, err, draws


@pytest.mark.parametrize(
    ("words", "ranks", "session"),
    [
        (["train", "looks.py", "--cpu"], ["alone"], False),
        (["train", "looks.py", "--cpu", "-n", 2], ["0", "1"], True),
        (["launch", "-n", 2, "--cpu", "looks.py", "word"], ["0", "1"], False),
        ([sys.executable, "looks.py", "word"], ["alone"], True),
    ],
)
def test_a_warm_process_sees_what_a_new_one_sees(
    folder: Path, words: list[object], ranks: list[str], session: bool
) -> None:
    how = {"start_new_session": True} if session else {}
    of_scripts = words[0] != "train"
    loaded = ("dtrain.", "torch._dynamo") if of_scripts else ("dtrain.",)
    assert is_warm()
    if of_scripts:
        warm_for_scripts()
    kinds = (subprocess.Popen, warm.ScriptPopen if of_scripts else warm.Popen)
    new, warmed = (seen(kind, folder, *words, ranks=tuple(ranks), **how) for kind in kinds)
    for one, other in zip(new[0], warmed[0], strict=True):
        more = {*other["modules"]} - {*one["modules"]}
        assert all(f"{name}.".startswith(loaded) for name in more), "these are loaded before the fork"
        assert ("torch._dynamo" in more) == of_scripts
        other["modules"] = [name for name in other["modules"] if name not in more]
        for name in one:
            assert other[name] == one[name], name
    assert warmed[1] == new[1]
    draws = [*new[2], *warmed[2]]
    assert len(set(draws)) == len(draws), "what nobody has seeded is another each time"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_a_warm_process_ends_by_a_signal_as_a_new_one(folder: Path, number: int) -> None:
    ends = []
    for kind in (subprocess.Popen, warm.Popen):
        (folder / "stays.py").write_text("import time\nopen('there', 'w').close()\ntime.sleep(60)\n")
        with start(kind, folder, "train", "stays.py", "--cpu") as process:
            wait_for((folder / "there").exists, "the recipe")
            process.send_signal(number)
            _, err = process.communicate(timeout=120)
        ends.append((process.returncode, err))
        (folder / "there").unlink()
    assert ends[0] == ends[1]


SKLEARN = ({"KMP_DUPLICATE_LIB_OK": "True"}, {"KMP_INIT_AT_FORK": "FALSE"})  # set where a test imports it


def test_what_is_no_warm_start_is_an_ordinary_one(folder: Path) -> None:
    assert is_warm() and warm.Popen.warm is not None
    environment = clean_environment()
    on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}  # by `dtrain launch --cpu`
    for late in ({"RANK": "0", "OMP_NUM_THREADS": "3", MARK: "1"}, {"TORCHINDUCTOR_CACHE_DIR": "x"}, *SKLEARN, on_cpu):
        assert warm.Popen.warm.unsuited(environment | late) == set()
    for name, value in {"PYTHONPATH": "x", "OMP_NUM_THREADS": "1,2", "LC_ALL": "C", "TORCH_LOGS": "all"}.items():
        assert warm.Popen.warm.unsuited(environment | {name: value}) == {name}
    code = "import gc, os; print(gc.get_freeze_count(), os.getppid())"
    done = warm.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.communicate(timeout=120)[0] == f"0 {psutil.Process().pid}\n"


def test_a_killed_command_leaves_nothing_warm(folder: Path) -> None:
    (folder / "stays.py").write_text("import os, time\nopen(f'there-{os.getpid()}', 'w').close()\ntime.sleep(60)\n")
    with start(warm.Popen, folder, "train", "stays.py", "--cpu", "-n", 2, start_new_session=True) as process:
        wait_for(lambda: len(list(folder.glob("there-*"))) == 2, "both ranks")
        below = psutil.Process(process.pid).children(recursive=True)
        assert {f"there-{one.pid}" for one in below} >= {path.name for path in folder.glob("there-*")}
        process.kill()
        process.communicate(timeout=120)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below), "their end")
