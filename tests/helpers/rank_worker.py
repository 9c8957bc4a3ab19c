"""One rank of a test: imports the test's function, calls it, writes what it returned."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent


def as_process(job: dict[str, Any], environment: dict[str, str]) -> None:
    """What a process does that was forked from one without this rank's environment."""
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that nothing was forked for
    for drawn in (
        sys.modules["numpy"].random,
        sys.modules["torch"].default_generator,
    ):  # which would be all ranks' the same
        drawn.seed()
    run(job)


def run(job: dict[str, Any]) -> None:
    """Calls the job's function once, or, in a pool, for each line of arguments that comes; then leaves."""
    from dtrain.distributed.world import bring_up

    faulthandler.enable()
    world = bring_up(cpu=True)
    spec = importlib.util.spec_from_file_location("test_under_ranks", job["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, job["function"])
    if job.get("pool"):
        for line in sys.stdin:
            print(json.dumps(function(world, **json.loads(line))), flush=True)
    else:
        (Path(job["out"]) / f"{world.rank}.json").write_text(json.dumps(function(world, **job["arguments"])))
    world.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.insert(0, str(TESTS))
    run(json.loads(sys.argv[1]))
