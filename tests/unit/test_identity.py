"""What ranks say of themselves, compared: no processes here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import WorldError
from dtrain.identity import check_identities, config_claims
from dtrain.launch.hardware import gpu_count, interface_to


def said(rank: int, device: str | None = None, host: str = "a", **same: str) -> dict[str, Any]:
    return {"rank": rank, "host": host, "pid": 10 + rank, "device": device, "same": same}


def test_ranks_that_agree_pass() -> None:
    check_identities(
        [said(1, "GPU-1", v="1"), said(0, "GPU-0", v="1"), said(2, "GPU-0", host="b", v="1"), said(3), said(4)][:3]
    )
    check_identities([])


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([said(0, v="1"), said(1, v="2"), said(2, v="1")], r"v is not the same on all ranks: 1 on rank 0, 2 \(a\), 2 on rank 1 \(a\)"),
        ([said(0), said(1, v="2")], r"nothing on rank 0 \(a\), 2 on rank 1"),
        ([said(0), said(0, host="b")], r"rank 0 \(process 10 on a\) and rank 0 \(process 10 on b\) are both rank 0"),
        ([said(0, "GPU-7"), said(1, "GPU-7")], r"rank 0 .* and rank 1 .* compute on one GPU, GPU-7 of a\. Start one rank"),
    ],
)  # fmt: skip
def test_ranks_that_differ_are_named(ranks: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(WorldError, match=told) as caught:
        check_identities(ranks)
    assert caught.value.agreed


def test_a_config_claims_values_and_the_recipes_content_not_its_folder(tmp_path: Path) -> None:
    claims = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "r.py"
        path.write_text("x = 1")
        claims.append(config_claims({"recipe": str(path), "train": {"epochs": 3}}, path))
    assert claims[0] == claims[1]
    assert claims[0]["config train.epochs"] == "3"


@pytest.mark.parametrize(("visible", "count"), [(None, 4), ("", 0), ("0,2", 2), ("1,-1,2", 1), ("GPU-a", 1)])
def test_gpus_are_counted_as_cuda_shows_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, count: int
) -> None:
    for number in range(4):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr("dtrain.launch.hardware._DEVICES", tmp_path)
    assert gpu_count({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_the_way_to_this_machine_is_lo() -> None:
    assert interface_to("127.0.0.1") == "lo"
