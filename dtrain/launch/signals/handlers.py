"""The handlers of the signals that ask to stop, which other code may replace: that is noticed, said, and undone.

A recipe or a library may set handlers of its own (at import, in a builder, in a step, or below Python), ignore the
signals, or block them. A request to stop would then end the process without a checkpoint, or not be heard at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from types import FrameType
from typing import Any

from dtrain.launch.monitor.exit_report import is_first_to_warn

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], None]

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")
_SIGACTION_BYTES = 512  # of struct sigaction; its first member is the handler on Linux and macOS
_LONGEST_WORDS = 200
_MOST_WARNINGS = 5
_READ_SECONDS = 2.0


class Handlers:
    """What this process does on some signals, and shall go on doing.

    Args:
        numbers: the signals.
        handler: theirs.
    """

    def __init__(self, numbers: Iterable[int], handler: Handler) -> None:
        self._numbers = tuple(numbers)
        self._handler = handler
        self._native: dict[int, int] = {}
        self._said: set[str] = set()
        self._process = os.getpid()
        self._pending: Any = None
        self._blocked_before = 0
        self._next_read = 0.0

    def set(self) -> None:
        """Sets the handlers, and lets the signals through to the calling thread, which must be the main one."""
        _let_go.clear()
        for number in self._numbers:
            signal.signal(number, self._handler)
        self._native = {number: _native_handler(number) for number in self._numbers}
        if _CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)

    def keep(self) -> None:
        """Says what has been put in their place, if anything, once, and sets them again; for any thread."""
        if os.getpid() != self._process:
            return
        replaced = self.replaced()
        if not replaced or _let_go.is_set():  # by `let_go`, meanwhile
            return
        self._say(replaced)
        if threading.current_thread() is threading.main_thread():
            self.set()
        else:
            self._set_in_main_thread()

    def unblock(self) -> None:
        """Lets the signals through to the calling thread: Python hears of them there if the main one blocks them."""
        if _CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)

    def replaced(self) -> dict[str, list[str]]:
        """Returns what is done instead, in words -> the names of the signals; costs some microseconds."""
        found: dict[str, list[str]] = {}
        blocked = self._blocked()
        for number in self._numbers:
            words = self._instead(number, blocked)
            if words:
                found.setdefault(words, []).append(signal.Signals(number).name)
        return found

    def _blocked(self) -> int:
        """Returns the signals that the main thread blocks, as a mask; not those that it blocks for a moment.

        multiprocessing does so while it starts a process.
        """
        if threading.current_thread() is threading.main_thread():
            return _blocked_in_main_thread()
        if time.monotonic() < self._next_read:  # what is read counts as the process's work, of which a hang has none
            return 0
        self._next_read = time.monotonic() + _READ_SECONDS
        now = _blocked_in_main_thread()
        lasting = now & self._blocked_before
        self._blocked_before = now
        return lasting

    def _instead(self, number: int, blocked: int) -> str:
        now = signal.getsignal(number)
        if now is not self._handler and now != self._handler:
            return f"dtrain's handler was replaced by {_words(now)}"
        native = _native_handler(number)
        if native != self._native.get(number, native):
            return f"dtrain's handler was replaced by {_native_words(native)}"
        return "blocked in the main thread, by pthread_sigmask" if blocked >> (number - 1) & 1 else ""

    def _say(self, replaced: dict[str, list[str]]) -> None:
        for how, names in replaced.items():
            if how in self._said or len(self._said) >= _MOST_WARNINGS:
                continue
            self._said.add(how)
            words = (
                f"dtrain: warning: {', '.join(names)}: {how}, so training would not have stopped on request. dtrain "
                "has restored its handler. Remove that call from the recipe or library; run cleanup "
                "after the command, or register it with atexit."
            )
            if is_first_to_warn(words):
                logger.warning(words)

    def _set_in_main_thread(self) -> None:
        """Has the main thread set the handlers between two of its bytecodes, as it runs Python's signal handlers.

        No other thread may set any, and the main one is in the user's code.
        """

        def call(_: object) -> int:
            with contextlib.suppress(Exception):  # nobody is there to catch it
                self.set()
            return 0

        if self._pending is None:
            self._pending = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(call)
        ctypes.pythonapi.Py_AddPendingCall(self._pending, None)


_let_go = threading.Event()


def let_go() -> None:
    """What is done on signals from here on, until handlers are set again, is dtrain's own doing."""
    _let_go.set()


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _native_handler(number: int) -> int:
    """Returns the address of what the kernel calls on a signal; 0 where this cannot be known."""
    if sys.platform == "win32":
        return 0
    action = ctypes.create_string_buffer(_SIGACTION_BYTES)
    if _library().sigaction(number, None, action) != 0:
        return 0
    return ctypes.c_size_t.from_buffer(action).value


def _blocked_in_main_thread() -> int:
    """Returns the signals that the main thread blocks, as a mask; 0 where this cannot be known."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return next((int(line.split()[1], 16) for line in file if line.startswith("SigBlk:")), 0)
    except (OSError, ValueError):
        return 0


def _words(handler: Any) -> str:
    """Names a handler that Python knows of, and where it is defined."""
    known = {signal.SIG_DFL: "the default action (SIG_DFL)", signal.SIG_IGN: "ignoring them (SIG_IGN)"}
    with contextlib.suppress(Exception):  # any object can be a handler, and anything can come of its attributes
        if isinstance(handler, signal.Handlers):
            return known[handler]
        function = getattr(handler, "__func__", handler)
        code = getattr(function, "__code__", None)
        if code is None:
            return f"{function.__module__}.{function.__qualname__}"[-_LONGEST_WORDS:]
        return f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"[-_LONGEST_WORDS:]
    return f"a {type(handler).__name__}"


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _native_words(address: int) -> str:
    """Names the library that a handler below Python belongs to."""
    if address in (0, 1):  # SIG_DFL, SIG_IGN
        return "the default action, or ignoring them, by a library below Python"
    found = _Symbol()
    with contextlib.suppress(AttributeError, OSError):
        if _library().dladdr(ctypes.c_void_p(address), ctypes.byref(found)) and found.file:
            return f"a handler of {os.fsdecode(found.file)[-_LONGEST_WORDS:]}, below Python"
    return "a handler of a library, below Python"
