"""The program of one rank that `call_on_ranks` starts: python rank.py FOLDER.

It runs nothing of the caller's script or notebook again: a script without `if __name__ == "__main__":` will do.
"""

import json
import os
import pathlib
import sys

if __name__ == "__main__":
    # Modules beside the notebook, and dtrain itself, are found where the caller found them.
    with open(os.path.join(sys.argv[1], "sys_path.json"), encoding="utf-8") as _file:  # noqa: PTH118, PTH123
        sys.path[:] = json.load(_file)
    _PARENT = str(pathlib.Path(__file__).resolve().parents[3])
    if _PARENT not in sys.path:
        sys.path.append(_PARENT)

from pathlib import Path

from dtrain.launch.monitor.exit_report import ExceptionInfo, fix_identity, identity, write_report
from dtrain.launch.monitor.stack_dump import listen
from dtrain.launch.signals.lifeline import end_with_parent
from dtrain.launch.signals.process_exit import leave, must_leave_at_once


def main() -> None:
    """Runs the call, and ends the process with the exit code that it told the supervisor."""
    fix_identity()
    end_with_parent()
    listen()
    text, code, told = run(Path(sys.argv[1]))
    write_report(code, text, told)
    if must_leave_at_once():
        leave(code)
    sys.exit(code)


def run(folder: Path) -> tuple[str, int, ExceptionInfo | None]:
    """Returns what a person shall read of a failure, empty where all went well, the exit code, and its parts."""
    from dtrain.errors import EXIT_OK, add_place
    from dtrain.launch.monitor.describe import explain

    try:
        _call(folder)
    except BaseException as error:  # noqa: BLE001 - described in full, then the process ends
        sys.last_value = error  # as the interpreter notes it; exit functions then do not wait for other ranks
        add_place(error, f"rank {identity().rank}")
        found = explain(error)
        return found.text, found.exit_code, found.told
    return "", EXIT_OK, None


def _call(folder: Path) -> None:
    from dtrain.api.spawn.parcel import read_parcel
    from dtrain.api.spawn.results import write_results
    from dtrain.distributed.lazy_dynamo import defer_dynamo
    from dtrain.distributed.world import bring_up

    function, arguments, changing = read_parcel(folder)
    world = bring_up(cpu=arguments.get("cpu", False))
    defer_dynamo()
    frame = function(**arguments, world=world)
    if world.is_main:
        write_results(folder, frame.to_dict("records"), changing)
    world.close()


if __name__ == "__main__":
    main()
