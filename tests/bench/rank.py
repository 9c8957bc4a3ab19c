"""One rank of a bench: `rank.py numbers|speed NAME VARIANT [OPTIONS] FOLDER`; started by `bench.starting`."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    import torch

    from bench.loading import load

    kind, name, variant, *options, folder = sys.argv[1:]
    torch.set_num_threads(1)
    rival = load(name)
    try:
        if kind == "numbers":
            told = _numbers(rival.NUMBERS[variant])
        else:
            from bench.duel import fight

            told = fight(rival.SPEED[variant], json.loads(options[0]))
    except Exception as error:  # noqa: BLE001 - it goes into the table
        told = {"error": (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0]}
        if kind == "speed":
            told["error"] += f" ({_where(error)})"
    rank = _rank()
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps({"rank": rank, "time": time.time(), **told}))
    sys.stdout.flush()
    if "error" in told:
        os._exit(1)


def _numbers(report: object) -> dict[str, object]:
    from bench.problems import Nine

    nine = Nine()
    loss, metric = report(nine)
    return {"loss": loss, "metric": metric, "seen": nine.net.seen}


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


if __name__ == "__main__":
    main()
