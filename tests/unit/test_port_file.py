"""Rank 0 of srun's tasks on one node leaves its port in a file: who may have written it, and what it may hold."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from dtrain.distributed.port_file import agree_on_port
from dtrain.errors import WorldError
from dtrain.launch.env.slurm_env import PORT_FILE

SHORT, LONG = timedelta(seconds=0.2), timedelta(seconds=60)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ports" / "slurm-1.0.0"
    monkeypatch.setenv(PORT_FILE, str(path))
    monkeypatch.setenv("MASTER_PORT", "1")
    return path


def put(place: Path, kind: str) -> None:
    place.parent.mkdir(mode=0o700)
    victim = place.parent / "other"
    victim.write_text("4711")
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(victim)
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_bytes(kind.encode("utf-8", "surrogateescape"))


WRONG = {
    "fifo": "it is a FIFO, not a file",
    "link": "it is a symbolic link, which is not followed",
    "folder": "it is a folder, not a file",
    "1" * 5000: "it is larger than the limit of 32 bytes",
    "nonsense": "it holds 'nonsense', which is no port",
    "": "it holds '', which is no port",
    "0": "no port",
    "65536": "no port",
    "-1": "no port",
    "٤٧": "no port",
    "4711\n4712": "no port",
    "\udcff\0": "no port",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_port_is_not_believed_and_named_when_the_time_is_over(place: Path, kind: str) -> None:
    put(place, kind)
    with pytest.raises(WorldError) as caught:
        agree_on_port(1, SHORT)
    assert str(caught.value).startswith(f"rank 0 did not come within 0.2 s: it would have left its port in {place} (")
    assert WRONG[kind] in str(caught.value)
    assert os.environ["MASTER_PORT"] == "1"


@pytest.mark.parametrize("kind", ["fifo", "link", "nonsense", "65536", ""])
def test_rank_0_replaces_what_is_in_the_way_and_the_others_take_its_port(place: Path, kind: str) -> None:
    put(place, kind)
    ports: list[str] = []

    def other() -> None:
        agree_on_port(1, LONG)
        ports.append(os.environ["MASTER_PORT"])

    waits = threading.Thread(target=other)
    waits.start()
    agree_on_port(0, LONG)
    waits.join(30)
    assert ports == [place.read_text()]
    assert 0 < int(ports[0]) < 65536
    assert (place.parent / "other").read_text() == "4711"
    assert place.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_in_which_others_can_write_is_refused(place: Path, mode: int) -> None:
    place.parent.mkdir()
    place.parent.chmod(mode)
    place.write_text("4711")
    for rank in (0, 1):
        with pytest.raises(WorldError, match=r"can be written by others\. Remove it, or set TMPDIR"):
            agree_on_port(rank, SHORT)


def test_a_folder_of_another_user_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.parent.mkdir(mode=0o700)
    place.write_text("4711")
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    for rank in (0, 1):
        with pytest.raises(WorldError, match="can be written by others"):
            agree_on_port(rank, SHORT)


def test_a_link_in_place_of_the_folder_is_refused(place: Path) -> None:
    elsewhere = place.parent.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    place.parent.symlink_to(elsewhere)
    for rank in (0, 1):
        (elsewhere / place.name).write_text("4711")
        with pytest.raises(WorldError, match="can be written by others"):
            agree_on_port(rank, SHORT)
