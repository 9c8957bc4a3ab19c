"""What ranks say of themselves, compared: no processes here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.distributed.handshake import SignedEntries, check_identities, config_claims, rank_info
from dtrain.errors import WorldError
from dtrain.launch.env.hardware import gpu_count
from dtrain.launch.env.rank_env import RankFacts


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
    assert caught.value.on_all_ranks


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
    monkeypatch.setattr("dtrain.launch.env.hardware._DEVICES", tmp_path)
    assert gpu_count({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


CLAIMS = {"config data.token": "'hush-hush'", "config train.epochs": "3", "the content of mine.py": "0123456789ab"}


def entries(key: bytes = b"k", scope: str = "0", rank: int = 0, **more: str) -> SignedEntries:
    return SignedEntries(rank_info(RankFacts(rank, 2), cpu=True, claims=CLAIMS | more), key, scope)


def test_an_entry_holds_nothing_of_the_config_but_digests_and_is_read_in_a_rank_s_own_words() -> None:
    text = entries(rank=1).text()
    for word in ("hush", "token", "epochs", "mine.py", "config"):
        assert word not in text
    read = entries().read(text.encode())
    assert read == rank_info(RankFacts(1, 2), cpu=True, claims=CLAIMS)
    other = entries().read(entries(rank=1, **{"config data.token": "'mum'"}).text().encode())
    with pytest.raises(
        WorldError, match=r"data\.token is not the same on all ranks: 'hush-hush' on rank 0 .*, another"
    ):
        check_identities([rank_info(RankFacts(0, 2), cpu=True, claims=CLAIMS), other])  # type: ignore[list-item]


def test_what_is_no_entry_of_this_job_s_is_none() -> None:
    text = entries().text()
    mine = entries()
    for foreign in (
        entries(b"another key").text(),
        entries(scope="1").text(),  # of the start before
        text[:-2] + "1}",
        text[:64],
        "",
        "x" * (1 << 21),
    ):
        assert mine.read(foreign.encode()) is None
    assert mine.read(b"\xff" * 100) is None
    assert mine.folder != entries(b"another key").folder


@pytest.mark.parametrize(
    "wrong",
    [[], {"rank": 1}, {"rank": "x"}, {"rank": 1e9}, {"rank": True}, {"same": []}, {"same": {"a": 1}}, {"host": 1}],
)
def test_an_entry_of_another_shape_is_none_whoever_made_it(wrong: object) -> None:
    said = rank_info(RankFacts(1, 2), cpu=True, claims={})
    maker = SignedEntries(said, b"k", "0")
    text = json.dumps({**said, **wrong} if isinstance(wrong, dict) and wrong != {"rank": 1} else wrong)
    assert entries().read((maker._mac(text) + text).encode()) is None


def test_a_setting_that_one_rank_alone_has_is_told() -> None:
    mine = rank_info(RankFacts(0, 2), cpu=True, claims=CLAIMS)
    theirs = entries().read(entries(rank=1, **{"config data.more": "1"}).text().encode())
    with pytest.raises(
        WorldError, match="a setting that this rank does not have is not the same on all ranks: nothing"
    ):
        check_identities([mine, theirs])  # type: ignore[list-item]
