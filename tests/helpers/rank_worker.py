"""One rank of a test: imports the test's function, calls it, writes what it returned."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def main() -> None:
    job = json.loads(sys.argv[1])
    sys.path.insert(0, str(TESTS))
    from dtrain.world import bring_up

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
    main()
