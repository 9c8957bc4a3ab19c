"""A terminal's Ctrl-Z stops the ranks, too, which are in sessions of their own, and `fg` or `bg` resumes them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


@contextlib.contextmanager
def stopped_together(groups: Callable[[], Sequence[int]]) -> Iterator[None]:
    """While inside, a SIGTSTP stops these process groups with this process; they continue when it does.

    Args:
        groups: returns the process groups.
    """
    number = getattr(signal, "SIGTSTP", None)
    if (
        number is None
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(number) is not signal.SIG_DFL
    ):
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        _send(groups(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _send(groups(), signal.SIGCONT)  # this process has got one

    signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def _send(groups: Sequence[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
