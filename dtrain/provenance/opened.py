"""The files of a project that its own code opens besides importing modules: read, executed, or loaded as libraries.

Python tells by audit events (PEP 578) of each file that is opened (so also of `exec(open(path).read())`), of code that
is executed (`runpy`), and of libraries that are loaded (extension modules, ctypes). What is executed under the name of
its file counts as code, like a module. Of the others a mark is kept, of a limited number: a hash of their beginning,
taken as they are opened, so that a later edit does not count. Files that the program writes are left out, and so are
those that no code of the user's opens. An audit hook stays until the process ends; an event that does not matter takes
a fraction of a microsecond, and a training step has a few.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from dtrain.provenance.code import is_generated
from dtrain.provenance.loading import is_installed, loaded_since, loadings, record_executed

_FILE_OF = {"open": 0, "import": 1, "ctypes.dlopen": 0, "exec": 0}  # event -> where among its arguments
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MOST_FILES = 100
_MOST_WRITTEN = 10_000
_HASHED = 4 << 20  # bytes of a file
_HASHED_AT_ALL = 64 << 20
_DIGITS = 32
_IMPORTS = "<frozen importlib"


class OpenedFiles:
    """Hears of what is opened, and keeps marks of what the user's own code has opened below a project's folder."""

    def __init__(self) -> None:
        self._project = ""
        self._marks: dict[str, tuple[tuple[int, int], str]] = {}  # path -> size and time, and the mark
        self._written: set[str] = set()
        self._own: set[str] = set()  # names of the user's modules
        self._counted = 0  # loadings that are among these
        self._bytes = 0
        self._busy: set[int] = set()  # threads that are in here, whose own reading is none of the user's
        self._hears = False
        self._process = 0  # not those that are forked off it, DataLoader workers among them

    def watch(self, project: Path) -> None:
        """From now on, in this process, notes what is opened below a folder; what was noted before is forgotten."""
        self._project = f"{project}/"
        self._marks, self._written, self._bytes = {}, set(), 0
        self._process = os.getpid()
        if not self._hears:
            self._hears = True

            sys.addaudithook(self._hook())

    def marks(self, without: set[Path], run: Path | None) -> dict[str, str]:
        """Returns the marks so far: path below the project's folder -> mark.

        Args:
            without: files that are compared as code.
            run: the run's folder, whose files are left out; None where there is none.
        """
        kept = {
            path: mark
            for path, (_, mark) in list(self._marks.items())
            if Path(path) not in without and (run is None or not Path(path).is_relative_to(run))
        }
        return {path.removeprefix(self._project): mark for path, mark in sorted(kept.items())}

    def changed(self, before: Mapping[str, str]) -> list[str]:
        """Returns the names of files that are not what they were; one that is not there now is not among them."""
        names = [name for name in before if not Path(name).is_absolute() and ".." not in Path(name).parts]
        found = {name: _mark(f"{self._project}{name}", _hashed(str(before[name]))) for name in names if self._project}
        return [name for name, mark in found.items() if mark and mark != before[name]]

    def _hook(self) -> Callable[[str, tuple[Any, ...]], None]:
        """A function, which is called faster than a method; at the interpreter's end, globals may be gone."""
        files, caller, quiet = _FILE_OF, sys._getframe, contextlib.suppress

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            if event in files:
                with quiet(Exception):  # it would come out of what is opened
                    self._hear(event, arguments, caller(1))

        return hear

    def _hear(self, event: str, arguments: tuple[Any, ...], frame: FrameType | None) -> None:
        thread = threading.get_ident()
        if thread in self._busy or os.getpid() != self._process:
            return
        self._busy.add(thread)
        try:
            if event == "exec":
                self._note_executed(arguments[0], frame)
            else:
                self._note(event, arguments, frame)
        finally:
            self._busy.discard(thread)

    def _note(self, event: str, arguments: tuple[Any, ...], frame: FrameType | None) -> None:
        path = self._below(arguments[_FILE_OF[event]])
        if path is None or path in self._written:
            return
        if event == "open" and arguments[2] & _WRITES:
            self._marks.pop(path, None)
            if len(self._written) < _MOST_WRITTEN:
                self._written.add(path)
            return
        if event == "open" and frame is not None and frame.f_code.co_filename.startswith(_IMPORTS):
            return  # a module, of which `loading` keeps the source
        if len(self._marks) >= _MOST_FILES and path not in self._marks:
            return
        about = Path(path).stat()
        known, current = self._marks.get(path), (about.st_size, about.st_mtime_ns)
        if (known is None or known[0] != current) and self._is_by_own_code(frame):
            size = min(_HASHED, about.st_size, max(0, _HASHED_AT_ALL - self._bytes))
            self._bytes += size
            mark = _mark(path, size)
            if mark:
                self._marks[path] = current, mark

    def _note_executed(self, code: Any, frame: FrameType | None) -> None:
        if not isinstance(code, CodeType) or code.co_filename[:1] == "<":
            return
        path = self._below(code.co_filename)
        while frame is not None and frame.f_globals.get("__name__") == "runpy":
            frame = frame.f_back
        if path is not None and self._is_own(frame):  # by its own code directly: caches of compilers are not the user's
            record_executed(Path(path), Path(path[len(self._project) :]))

    def _below(self, file: Any) -> str | None:
        """Returns the whole path of a file of the project; None of any other."""
        if not isinstance(file, (str, bytes, os.PathLike)):
            return None  # a descriptor, or a module without a file
        path = os.path.abspath(os.fsdecode(file))  # noqa: PTH100 - a link counts by its own place, and this is quick
        if not path.startswith(self._project) or is_installed(path):
            return None
        return None if is_generated(Path(path[len(self._project) :])) else path

    def _is_by_own_code(self, frame: FrameType | None) -> bool:
        while frame is not None and not self._is_own(frame):
            frame = frame.f_back
        return frame is not None

    def _is_own(self, frame: FrameType | None) -> bool:
        if self._counted != loadings():
            self._own.update(source.module for source in loaded_since(self._counted))
            self._counted = loadings()
        return frame is not None and frame.f_globals.get("__name__") in self._own


def _mark(path: str, size: int) -> str:
    """Returns a file's length, and a hash of so much of its beginning; an empty text for what is no file."""
    with contextlib.suppress(OSError, ValueError):  # gone; or what is no file's name, in a manifest of somebody else's
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(descriptor)
            if stat.S_ISREG(about.st_mode):
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    content = file.read(min(size, _HASHED))
                return f"{about.st_size}:{len(content)}:{hashlib.sha256(content).hexdigest()[:_DIGITS]}"
        finally:
            os.close(descriptor)
    return ""


def _hashed(mark: str) -> int:
    """Returns how much of a file a mark is a hash of."""
    parts = mark.split(":")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0


opened_files = OpenedFiles()  # of this process, as the hook is
