"""`dtrain doctor` on this machine, with real ranks."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.commands import Dtrain


def test_two_ranks_add_up_right_and_nothing_is_left(dtrain: Dtrain, tmp_path: Path) -> None:
    done = dtrain("doctor", "--json", "-n", 2, "--cpu")
    told = json.loads(done.out)
    found = {one["name"]: one for one in told["findings"]}
    assert (done.code, done.err) == (0, ""), done.text
    assert told["worst"] in ("pass", "warn")
    assert found["all-reduce"]["measured"].startswith("gloo, 2 ranks: correct, ")
    for name in ("torch", "compute", "ports", "disk speed", "file locks", "versions"):
        assert found[name]["state"] in ("pass", "warn"), found[name]
    assert found["W&B"]["state"] == "skip"
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_named_with_its_remedy(dtrain: Dtrain, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    faults = {"GLOO_SOCKET_IFNAME": "nope9", "OMP_NUM_THREADS": "999"}
    done = dtrain("doctor", "run.dir=file/runs", "-n", 2, "--cpu", **faults)
    lines = done.out.splitlines()
    assert done.code == 1, done.text
    for start, remedy in (
        ("warn  cores ", "unset OMP_NUM_THREADS"),
        ("fail  environment ", "unset GLOO_SOCKET_IFNAME"),
        ("fail  run folder ", "run.dir=FOLDER"),
        ("fail  ranks ", "dtrain check parity -n 2"),
    ):
        (number,) = [number for number, line in enumerate(lines) if line.startswith(start)]
        assert lines[number + 1].strip().startswith("remedy: "), lines[number + 1]
        assert remedy in lines[number + 1]
    assert "nope9" in next(line for line in lines if line.startswith("fail  ranks "))
