"""`dtrain doctor --nodes` as a whole: in the job, in an allocation, or from a login node."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.launch.monitor.exit_report import write_whole
from dtrain.tools.doctor.finding import Finding
from dtrain.tools.doctor.local import DoctorRequest
from dtrain.tools.doctor.nodes.cluster_report import Plan
from dtrain.tools.doctor.nodes.job import RESULT, DoctorJob, allocation, chosen, nodes_of_job, run_job, work_folder

Rows = list[list[str]]
Told = Callable[[str], None]


def check_nodes(request: DoctorRequest, order: DoctorJob, into: Path | None, tell: Told) -> tuple[list[Finding], Rows]:
    """Looks at several nodes, and returns the findings and a table of the nodes.

    Args:
        request: what shall be looked at; its ranks are those of each node.
        order: what is asked of SLURM, where no allocation is there yet.
        into: in the job that another `dtrain doctor` has submitted, the folder where it waits for the result.
        tell: is given a line whenever there is news.

    Raises:
        UsageError: SLURM's commands are not here, or the allocation is too small.
        SlurmError: SLURM refused the job.
    """
    if into is not None:
        found, rows = _examine(request, chosen(nodes_of_job(), order.nodes), into)
        write_whole(into / RESULT, json.dumps({"findings": [asdict(one) for one in found], "nodes": rows}))
        return found, rows
    nodes = allocation()
    with work_folder(request.runs) as folder:
        if nodes:
            tell(f"in the current allocation: {order.nodes} of {len(nodes)} nodes")
            return _examine(request, chosen(nodes, order.nodes), folder)
        result: Any = run_job(order, folder, tell)
    if isinstance(result, Finding):
        return [result], []
    return [Finding(**one) for one in result["findings"]], result["nodes"]


def _examine(request: DoctorRequest, nodes: tuple[str, ...], folder: Path) -> tuple[list[Finding], Rows]:
    from dtrain.tools.doctor.nodes.host import examine
    from dtrain.tools.doctor.nodes.verdict import judge, table

    seen = examine(Plan(nodes, folder, request.ranks, request.cpu, request.wandb))
    return judge(seen, str(folder.parent)), table(seen)
