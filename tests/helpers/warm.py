"""Warm starts: `dtrain` and its ranks forked from a process that has imported torch, the like, and dtrain already.

A process of their own needs some seconds for these imports, most of what a short command takes. What is forked looks as if
it had been started: argv, /proc/PID/cmdline and environ, its parent, session, signals, streams, and its end are the same
(`tests/launch/test_warm.py` compares the two). It is not used where the environment holds what is read by an import or by
the interpreter itself, on other systems than Linux, in the full sweep, and where DTRAIN_TEST_WARM is 0.

    tests --- warm process --- (middle, which ends at once) --- `dtrain train -n 2` --- its own warm process --- (middle) --- rank

The middle one's end gives its child to the one that asked, which is a subreaper meanwhile (prctl(2)): it waits for it as
for any child. This file is read by the warm processes too, which have nothing else of the tests: the standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import importlib.util
import io
import json
import mmap
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    *("torch", "numpy", "pandas", "sklearn.datasets", "sklearn.model_selection", "accelerate", "accelerate.utils"),
    *("pydantic.main", "pydantic.types", "pydantic.json_schema", "yaml", "safetensors.torch", "psutil", "torchinfo"),
    *("typer", "rich.console", "rich.table", "rich.markup"),
    *("dtrain.cli.app", "dtrain.trainer.train"),  # what a launcher and a rank import of dtrain's own
)
# What a script's first optimizer imports; of dtrain's verbs, none does.
SCRIPTS_MODULES = ("torch._dynamo",)
# What may differ from the warm process's environment: it is read when it is needed, and by no import.
_LATE = re.compile(
    r"(DTRAIN|SLURM|WANDB|ACCELERATE)_\w+|CUDA_VISIBLE_DEVICES|((LOCAL|NODE|GROUP)_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|GLOO_SOCKET_IFNAME|"
    r"OMP_NUM_THREADS|OPENBLAS_NUM_THREADS|PATH|TMPDIR|COLUMNS|LINES|PYTEST_\w+|TORCHINDUCTOR_CACHE_DIR|"
    r"KMP_(DUPLICATE_LIB_OK|INIT_AT_FORK)|"  # scikit-learn sets them as it is imported
    # Those of the tests' own programs and recipes.
    r"SLOW|SECRET|NOTED|SWEEP_CASE|DIE|DIE_AT|TERM_IN|RANKS|NORM|NAME|POLICY|FICKLE|SCALE|HIDDEN|DROP|DATA|ORDERED|LR|GAMMA|SEED|BATCH|OPTIMIZER"
)
_ONLY = {"stdin", "stdout", "stderr", "text", "cwd", "env", "start_new_session"}
_MAY_START_RANKS = ("-n", "--ranks", "launch", "check", "bench", "find", "doctor")
_LARGEST = 1 << 20  # bytes of a request
_RENAMED: list[mmap.mmap] = []
_SET_PDEATHSIG, _SET_NAME, _SET_MM, _SET_MM_MAP, _SET_SUBREAPER = 1, 15, 35, 14, 36


class Warm:
    """A connection to a warm process.

    Args:
        connection: where requests go, and process ids come from.
        environment: with which the warm process has imported what it did.
    """

    def __init__(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._connection = connection
        self._environment = environment
        self._lock = threading.Lock()

    def unsuited(self, environment: Mapping[str, str]) -> set[str]:
        """Returns the variables with which a process might have imported something else."""
        differ = {name for name, _ in self._environment.items() ^ environment.items() if not _LATE.fullmatch(name)}
        threads = environment.get("OMP_NUM_THREADS", "1")
        return differ if threads.isdecimal() else {*differ, "OMP_NUM_THREADS"}

    def start(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        """Returns the id of a new child of this process."""
        with self._lock, _subreaper():
            socket.send_fds(self._connection, [json.dumps(request).encode()], list(fds))
            return int(self._connection.recv(32))

    def with_more(self, modules: Sequence[str]) -> tuple[Warm, int]:
        """Has a fork of the warm process import more; returns the connection to it, and its id."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = self.start({"modules": modules}, [theirs.fileno()])
        atexit.register(_end, ours, pid, os.getpid())
        assert ours.recv(32) == b"warm", modules
        return Warm(ours, self._environment), pid


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A `subprocess.Popen` that starts `dtrain` warm where it can, and whatever else as ever."""

    warm: Warm | None = None

    def __init__(self, args: Any, bufsize: int = -1, **how: Any) -> None:
        self._how = how
        super().__init__(args, bufsize, **how)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        how, (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite) = self._how, rest[9:15]
        environment = dict(os.environ if how.get("env") is None else how["env"])
        folder = os.fspath(how.get("cwd") or Path.cwd())
        argv = _argv(args, folder, environment.get("PATH", ""))
        known = argv is not None and set(how) <= _ONLY and Path(folder).is_dir()
        if self.warm is None or not known or self.warm.unsuited(environment):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        request = {
            "argv": argv,
            "name": Path(args[0]).name,
            "folder": folder,
            "environment": environment,
            "session": bool(how.get("start_new_session")),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "ignored": [int(number) for number in signal.valid_signals() if _ignored(number)],
        }
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = self.warm.start(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


class ScriptPopen(Popen):
    """The same for scripts, and for what starts them."""


def suits(environment: Mapping[str, str] | None) -> bool:
    """Whether a program is started warm with this environment, None for this process's."""
    return Popen.warm is not None and not Popen.warm.unsuited(os.environ if environment is None else environment)


def _ignored(number: int) -> bool:
    return number not in (signal.SIGPIPE, signal.SIGXFSZ) and signal.getsignal(number) == signal.SIG_IGN


def _argv(args: Any, folder: str, path: str) -> list[str] | None:
    """The interpreter's whole argv, where these words start a program that imports what is imported already."""
    words = [os.fspath(word) for word in args] if isinstance(args, list) else []
    if words and words[0] == str(Path(sys.executable).with_name("dtrain")):
        return [sys.executable, *words]
    ours = shutil.which("python", path=path) == str(Path(sys.executable).with_name("python"))
    interpreters = ("python", sys.executable) if ours else (sys.executable,)
    if len(words) < 2 or words[0] not in interpreters or not words[1].endswith(".py"):
        return None
    ours = os.path.dirname(importlib.util.find_spec("dtrain").origin)  # type: ignore[union-attr,arg-type,type-var]  # noqa: PTH120
    if words[1] == f"{ours}/__main__.py" or words[1].endswith("/helpers/rank_worker.py"):
        return words
    script = words[2] if words[1] == f"{ours}/launch/script_runner.py" else words[1]
    return words if _imports_torch(Path(folder, script)) else None


def _imports_torch(script: Path) -> bool:
    """Whether a script asks for torch: one that does not may be looked at for whether it does."""
    try:
        return re.search(rb"^(import|from) torch\b", script.read_bytes(), re.MULTILINE) is not None
    except OSError:
        return False


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    _prctl(_SET_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_SET_SUBREAPER, 0)


def _prctl(option: int, value: Any, third: int = 0, fourth: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, ctypes.c_ulong(third), ctypes.c_ulong(fourth), 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def connect(environment: Mapping[str, str]) -> tuple[Warm, int] | None:
    """Starts a warm process, which ends with this one.

    Args:
        environment: its own; what is to be started needs much the same.

    Returns:
        the connection and the process's id; or None where this machine cannot do it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        "import sys, importlib.util as util; spec = util.spec_from_file_location('warm_start', sys.argv[1]); "
        "warm = util.module_from_spec(spec); spec.loader.exec_module(warm); warm.main(int(sys.argv[2]))"
    )
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(theirs.fileno())],
            env={"OPENBLAS_NUM_THREADS": "1", **environment},  # whose threads would not outlive a fork
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    try:
        if ours.recv(32) != b"warm":
            process.wait()
            return None
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = 0  # which `_end` waits for
    atexit.register(_end, ours, process.pid, os.getpid())
    return Warm(ours, environment), process.pid


def _end(connection: socket.socket, pid: int, owner: int) -> None:
    if os.getpid() == owner:  # and none that was forked off it
        connection.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main(fd: int) -> None:
    """The warm process; what it forks returns into the program that was asked for."""
    connection = socket.socket(fileno=fd)
    before = len([*Path("/proc/self/fd").iterdir()])
    sys.path[:] = sys.path[1:]  # the current folder, which "-c" puts first, and which may be a checkout
    _import(MODULES)
    _rename(sys.orig_argv, os.environ)  # where it is not allowed, this says so
    if len([*Path("/proc/self/fd").iterdir()]) != before or "torch._dynamo" in sys.modules:
        sys.exit("not fit to be forked")
    connection.send(b"warm")
    _run(_serve(connection))


def _import(modules: Iterable[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    if len([*Path("/proc/self/task").iterdir()]) != 1:
        sys.exit("not fit to be forked: it has threads")
    gc.collect()
    gc.freeze()


def _serve(connection: socket.socket) -> list[str]:
    """Forks a process for each request; in that, returns its argv."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a terminal's Ctrl-C is for those that are forked
    while True:
        told, fds, _, _ = socket.recv_fds(connection, _LARGEST, 3)
        if not told:
            os._exit(0)
        pid = _fork()
        if pid is None:
            connection.close()
            request = json.loads(told)
            if "modules" not in request:
                return _become(request, fds)
            connection = socket.socket(fileno=fds[0])
            _import(request["modules"])
            connection.send(b"warm")
            continue
        for fd in fds:
            os.close(fd)
        connection.send(str(pid).encode())


def _fork() -> int | None:
    """Returns the id of a process which has this one's parent, or that above, as its own; in it, None."""
    (told, tell), (waits, goes) = os.pipe(), os.pipe()
    middle = os.fork()
    if middle == 0:
        child = os.fork()
        if child:
            os.write(tell, str(child).encode())
            os._exit(0)
        os.close(goes)
        os.read(waits, 1)  # until the middle one's end was seen
        for fd in (told, tell, waits):
            os.close(fd)
        return None
    os.waitpid(middle, 0)
    pid = int(os.read(told, 32))
    for fd in (told, tell, waits, goes):
        os.close(fd)
    return pid


def _become(request: dict[str, Any], fds: Sequence[int]) -> list[str]:
    """Makes this process what a new one would be."""
    argv: list[str] = request["argv"]
    for own, fd in enumerate(fds):
        os.dup2(fd, own)
    for fd in fds:
        os.close(fd)
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    sys.modules["multiprocessing.process"].ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]  # noqa: PTH109
    os.environ.clear()
    os.environ.update(request["environment"])
    _rename(argv, os.environ)
    _prctl(_SET_NAME, ctypes.c_char_p(request["name"].encode()[:15]))
    _open_streams()
    threads = os.environ.get("OMP_NUM_THREADS")
    for path in {*re.findall(r"/\S*libgomp\S*", Path("/proc/self/maps").read_text())} if threads else ():
        ctypes.CDLL(path).omp_set_num_threads(int(threads))  # which it reads as it is loaded
    tempfile.tempdir = None
    for drawn in (sys.modules["numpy"].random, sys.modules["torch"].default_generator):  # `random` does so by itself
        drawn.seed()
    sys.orig_argv, sys.argv = argv, argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[1])))  # noqa: PTH100, PTH120
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if "RANK" not in os.environ and any(word.startswith(_MAY_START_RANKS) for word in argv[2:]):
        _warm_ranks()
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    return argv


def _warm_ranks() -> None:
    """Keeps a fork of this process, from which its ranks are forked; in those, goes on as such."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork() == 0:
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        ours.close()
        if os.getppid() != parent:
            os._exit(0)
        _rename([sys.executable, "-c", "what ranks are forked from"], os.environ)
        del sys.path[0]
        _run(_serve(theirs))
    theirs.close()
    Popen.warm = Warm(ours, dict(os.environ))
    subprocess.Popen = Popen  # type: ignore[misc]


def _run(argv: list[str]) -> None:
    """Runs the program as the interpreter would, and leaves with what it returns."""
    program = types.ModuleType("__main__")
    file = os.path.abspath(argv[1])  # noqa: PTH100 - which follows no link
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    vars(program).update(__file__=file, __loader__=loader, __builtins__=sys.modules["builtins"], __cached__=None)
    sys.modules["__main__"] = program
    code: Any = 0
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), vars(program))  # noqa: S102 - that is what it is for
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            raise
    _leave(code)


def _leave(code: int) -> None:
    """What the interpreter does last, but for freeing one object after another: that would copy the memory it shares."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            code = 120  # the interpreter's own, where nobody reads what it would write
    os._exit(code & 0xFF)


def _open_streams() -> None:
    """The standard streams anew, for files that may be of another kind."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, f"__{name}__")
        file = open(fd, "rb" if fd == 0 else "wb", closefd=False)  # noqa: SIM115
        file.raw.name = f"<{name}>"  # as the interpreter names them
        lines = name == "stderr" or os.isatty(fd)
        text = io.TextIOWrapper(file, old.encoding, old.errors, None if fd == 0 else "\n", lines)
        text.mode = "r" if fd == 0 else "w"
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _rename(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Has /proc/PID/cmdline and environ show these: prctl(2), PR_SET_MM_MAP."""
    words = b"".join(os.fsencode(word) + b"\0" for word in argv)
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    memory = mmap.mmap(-1, len(words + variables), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(words + variables)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _RENAMED.append(memory)
    middle, end = start + len(words), start + len(words + variables)
    libc = ctypes.CDLL(None)
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    fields = [0, 0, 0, *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]  # as proc(5) numbers them
    code, data, stack = (int(fields[n]) for n in (26, 27)), (int(fields[n]) for n in (45, 46)), int(fields[28])
    layout = (*code, *data, int(fields[47]), libc.sbrk(0), stack, start, middle, middle, end)
    packed = struct.pack("11QQIi", *layout, 0, 0, -1)
    _prctl(_SET_MM, _SET_MM_MAP, ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value or 0, len(packed))
