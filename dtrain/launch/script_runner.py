"""Runs a Python script as one rank: as `python SCRIPT ARGUMENTS` would, with a report to the supervisor at the end.

It is started by its path, so that it needs no installed dtrain; the script gets the `sys.path` and `sys.argv` that
it would have alone.
"""

import os
import sys

_LAUNCH = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is not imported yet
_PARENT = os.path.dirname(os.path.dirname(_LAUNCH))  # noqa: PTH120
if __name__ == "__main__":
    # This folder's threads.py and reports.py must not shadow the script's own modules of that name.
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != _LAUNCH]  # noqa: PTH100
    if not any(os.path.abspath(p or ".") == _PARENT for p in sys.path):  # noqa: PTH100
        sys.path.append(_PARENT)

import runpy  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from dtrain.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, DtrainError, add_place  # noqa: E402
from dtrain.launch.monitor.describe import explain, users_line  # noqa: E402
from dtrain.launch.monitor.exit_report import ExceptionInfo, fix_identity, identity, write_report  # noqa: E402
from dtrain.launch.monitor.heartbeat import SCRIPT, own_heartbeat  # noqa: E402
from dtrain.launch.monitor.stack_dump import listen  # noqa: E402
from dtrain.launch.signals.lifeline import end_with_parent  # noqa: E402
from dtrain.launch.signals.process_exit import leave, must_leave_at_once  # noqa: E402


def main() -> None:
    """Runs the script that the command line names, and ends the process with its exit code."""
    fix_identity()
    end_with_parent()
    listen()
    heartbeat = own_heartbeat()
    if heartbeat is not None:
        heartbeat.enter(SCRIPT)
    text, code, told = run_script(sys.argv[1], sys.argv[2:])
    write_report(code, text, told, alone=trained_alone())
    if must_leave_at_once():
        leave(code)
    sys.exit(code)


def run_script(script: str, arguments: list[str]) -> tuple[str, int, ExceptionInfo | None]:
    """Runs a script in this process.

    Returns:
        what a person shall read of its failure (empty where it went well), its exit code, and the failure in parts.
    """
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            sys.last_value = end
        return *_ended(end.code), None
    except KeyboardInterrupt:
        return f"dtrain: stopped by Ctrl-C{_on_rank()}.", EXIT_INTERRUPTED, None
    except BaseException as error:  # noqa: BLE001 - described in full, then the process ends
        sys.last_value = error  # as the interpreter notes it; exit functions may look
        line = users_line(error) if isinstance(error, DtrainError) else None
        add_place(error, ", ".join(filter(None, (f"rank {identity().rank}", line))))
        found = explain(error)
        return found.text, found.exit_code, found.told
    return "", EXIT_OK, None


def trained_alone() -> bool:
    """Whether an optimizer was made in this process, and no process group: as by a script that knows of no ranks.

    A script that is no training makes no optimizer, and may well run once for each rank.
    """
    optim = sys.modules.get("torch.optim.optimizer")
    if optim is None:
        return False
    groups = sys.modules.get("torch.distributed.distributed_c10d")
    # What it was made with is known also after it was left.
    joined = groups is not None and (groups.is_initialized() or groups._default_pg_init_method is not None)
    return not joined and any(_was_made(kind) for kind in optim.Optimizer.__subclasses__())


def _was_made(kind: Any) -> bool:
    """Whether there was an object of this class of optimizers, or of one made of it; torch then marks its `step`."""
    return getattr(kind.step, "hooked", False) or any(_was_made(derived) for derived in kind.__subclasses__())


def _ended(code: object) -> tuple[str, int]:
    """What sys.exit(code) in a script means: nothing or a number is a code, all else is a message and code 1."""
    if code is None or code == 0:
        return "", EXIT_OK
    if isinstance(code, int):
        return f"dtrain: error: the script ended with exit code {code}{_on_rank()}.", code
    return f"{code}\ndtrain: error: the script called sys.exit() with this message{_on_rank()}.", EXIT_FAILED


def _on_rank() -> str:
    me = identity()
    return f" on rank {me.rank}" if me.size > 1 else ""


if __name__ == "__main__":
    main()
