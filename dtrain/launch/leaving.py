"""How a rank leaves: without tearing the interpreter down."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from typing import NoReturn


def must_leave_at_once() -> bool:
    """Whether this process is one of several ranks and has torch's process groups loaded."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdigit() and int(size) > 1 and "torch.distributed" in sys.modules


def leave(code: int) -> NoReturn:
    """Ends a rank: threads are waited for (where all went well), exit functions run, streams are flushed; no more.

    gloo's threads may still hold tensors then, ask for the interpreter's lock, and abort the process
    ("terminate called without an active exception"), after a run that went well.
    """
    if code == 0:
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
