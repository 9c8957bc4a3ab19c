"""Compares a run that was killed and went on with one that was not, step by step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.rundir.columns import TIMES

Line = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Where the resumed run differs first.

    Attributes:
        where: step and thing, in words.
        whole: its value in the uninterrupted run.
        resumed: its value in the resumed one.
        cause: what it is likely to come from, and the remedy.
    """

    where: str
    whole: str
    resumed: str
    cause: str


def read_record(folder: Path) -> list[list[Line]]:
    """Returns each rank's lines, as `dtrain.tools.check.rehearsal` wrote them; one without its end is left out."""
    records = []
    for path in sorted(folder.glob("rank-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2])):
        text = path.read_text(encoding="utf-8")
        records.append([json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()])
    return records


def compare(whole: list[list[Line]], resumed: list[list[Line]]) -> Difference | None:
    """Compares the steps of a resumed run with the same ones of an uninterrupted one.

    Args:
        whole: each rank's lines.
        resumed: the same, of the process that went on alone.

    Returns:
        the first difference in the order of time, None where there is none.
    """
    for rank, (one, two) in enumerate(zip(whole, resumed, strict=True)):
        by_place = {(line["updates"], line["end"]): line for line in one}
        for line in two:
            before = by_place.get((line["updates"], line["end"]))
            found = _compare_line(before, line) if before is not None else _extra(line)
            if found is not None:
                place = f"epoch {line['epoch']}, optimizer step {line['updates']}, rank {rank}"
                return Difference(f"{place}: {found.where}", found.whole, found.resumed, found.cause)
    ends = [[line["row"] for line in record[0] if line["end"]] for record in (whole, resumed)]
    if len(ends[1]) == 0 or ends[0][-1]["epoch"] != ends[1][-1]["epoch"]:
        return Difference("the number of epochs", str(len(ends[0])), str(len(ends[1])), "the resumed run ended early.")
    return None


def _extra(line: Line) -> Difference:
    return Difference("there is such a step", "no", f"yes, step {line['updates']}", "a loader whose length changes.")


def _compare_line(one: Line, two: Line) -> Difference | None:
    return (
        _compare_samples(one, two)
        or _compare_values(one, two)
        or _compare_state(one, two)
        or _compare_row(one["row"], two["row"])
    )


def _compare_samples(one: Line, two: Line) -> Difference | None:
    for before, now in zip(one["shares"], two["shares"], strict=False):
        if before["indices"] != now["indices"]:
            return Difference(
                "the samples' indices",
                str(before["indices"]),
                str(now["indices"]),
                "a sampler or batch sampler with a state, or a random generator that is not its attribute. Give it "
                "state_dict() and load_state_dict(), or keep the generator as an attribute.",
            )
        if before["rows"] != now["rows"]:
            return Difference(
                "the samples' values",
                f"fingerprints {before['rows'][:3]}",
                f"{now['rows'][:3]}",
                "a random generator that is neither global (torch, NumPy, Python) nor an attribute of the dataset, a "
                "stateful dataset, or data that depends on time or process ID. Use a global generator, "
                "seed by sample and epoch, or give the dataset state_dict() and load_state_dict().",
            )
    return None


def _compare_values(one: Line, two: Line) -> Difference | None:
    for before, now in zip(one["shares"], two["shares"], strict=False):
        for name, value in before["values"].items():
            if repr(value) != repr(now["values"].get(name)):
                return Difference(
                    name,
                    repr(value),
                    repr(now["values"].get(name)),
                    "the samples are equal, so something that the step uses is not in the checkpoint: a random "
                    "generator, a counter or list on the model or in the file, the process ID or the time. "
                    "Make it a buffer of the model, or an object with state_dict() and load_state_dict().",
                )
    return None


def _compare_state(one: Line, two: Line) -> Difference | None:
    cause = (
        "the losses are equal but the weights are not: an optimizer, a schedule or an accumulated gradient is not "
        "in the checkpoint. Set model.optimizer, return the scheduler from build_scheduler, or "
        "give the object state_dict() and load_state_dict()."
    )
    if one["lr"] != two["lr"]:
        return Difference("the learning rate", str(one["lr"]), str(two["lr"]), cause)
    for what in ("weights", "optimizer"):
        for name, value in one[what].items():
            if value != two[what].get(name):
                return Difference(f"the {what}: {name}", f"{value:x}", f"{two[what].get(name, 0):x}", cause)
    return None


def _compare_row(one: Line | None, two: Line | None) -> Difference | None:
    for name, value in (one or {}).items():
        if name not in TIMES and repr(value) != repr((two or {}).get(name)):
            cause = (
                "validation uses a random generator other than the global ones, or a metric keeps its own state."
                if name.startswith("val_")
                else "a metric keeps its own state."
            )
            return Difference(f"the history's {name}", repr(value), repr((two or {}).get(name)), cause)
    return None
