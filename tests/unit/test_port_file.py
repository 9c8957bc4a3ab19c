"""Rank 0 of srun's tasks on one node leaves its port in a file: who may have written it, and what it may hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest

from dtrain.distributed.port_file import agreed_port
from dtrain.errors import WorldError
from dtrain.launch.env.slurm_env import PORT_FILE
from dtrain.launch.signals.owner import Owner

SHORT, LONG = timedelta(seconds=0.2), timedelta(seconds=60)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ports" / "slurm-1.0.0"
    monkeypatch.setenv(PORT_FILE, str(path))
    monkeypatch.setenv("MASTER_PORT", "1")
    return path


def agree_on_port(rank: int, limit: timedelta) -> str:
    with agreed_port(rank, limit):
        return os.environ["MASTER_PORT"]


def entry(port: object, **owner: object) -> str:
    return json.dumps({"port": port, "owner": asdict(Owner.me()) | owner})


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
    "1" * 5000: "it is larger than the limit of 4,096 bytes",
    "nonsense": "it holds 'nonsense', which names no port",
    "": "it holds '', which names no port",
    "4711": "no port",
    entry(0): "no port",
    entry(65536): "no port",
    entry(-1): "no port",
    entry("4711"): "no port",
    entry(True): "no port",
    entry(4711, pid="1"): "no port",
    '{"port": 4711}': "no port",
    "[" * 4000: "no port",
    "\udcff\0": "no port",
}


@pytest.mark.parametrize("kind", WRONG, ids=range(len(WRONG)))
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

    waits = threading.Thread(target=lambda: ports.append(agree_on_port(1, LONG)))
    waits.start()
    with agreed_port(0, LONG):
        waits.join(30)
        assert ports == [str(json.loads(place.read_text())["port"])]
        assert place.stat().st_mode & 0o777 == 0o600
    assert 0 < int(ports[0]) < 65536
    assert (place.parent / "other").read_text() == "4711"


def test_the_file_goes_as_soon_as_the_ranks_have_met(place: Path) -> None:
    with pytest.raises(ZeroDivisionError), agreed_port(0, LONG):
        assert place.exists()
        raise ZeroDivisionError
    assert not place.exists()


def test_a_port_that_a_killed_rank_0_has_left_behind_is_not_believed(place: Path) -> None:
    program = (
        "import os, sys; from datetime import timedelta; from dtrain.distributed.port_file import agreed_port\n"
        "with agreed_port(0, timedelta(seconds=60)):\n    print(os.environ['MASTER_PORT'], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        port = killed.stdout.readline().decode().strip()
        assert agree_on_port(1, LONG) == port
        killed.kill()
    assert place.exists()
    with pytest.raises(WorldError, match=rf"holds the port of process {killed.pid} on .*, which has ended\)"):
        agree_on_port(1, SHORT)


def test_a_port_of_another_container_s_process_is_believed(place: Path) -> None:
    place.parent.mkdir(mode=0o700)
    place.write_text(entry(4711, machine="this host, another namespace", pid=1 << 22))
    assert agree_on_port(1, SHORT) == "4711"


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
