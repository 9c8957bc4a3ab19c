"""What the served page reads: each file once, as long as it is as it was, however many ask."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import make_run, rows

from dtrain.report import site as module
from dtrain.report.finding import RunLocation
from dtrain.report.runs import Run, read_run
from dtrain.report.site import Site
from dtrain.rundir.history import History


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the runs that were read, as they are."""
    found: list[str] = []

    def noted(place: RunLocation) -> Run:
        found.append(place.name)
        return read_run(place)

    monkeypatch.setattr(module, "read_run", noted)
    monkeypatch.setattr(module, "_REST", 0)
    return found


def asked(site: Site, since: str = "", known: str = "") -> tuple[list[Any] | None, str]:
    """The names of the runs that have not changed since, the whole of others; and the tag."""
    parts, tag = site.data(since, known)
    return (None if parts is None else json.loads(b"".join(parts))["runs"]), tag


def test_a_run_is_read_again_where_one_of_its_files_has_changed_and_only_then(tmp_path: Path, read: list[str]) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path / name, rows(3), config={"train": {"epochs": 9}})
    site = Site([], tmp_path)
    runs, tag = asked(site)
    assert runs is not None
    assert sorted(read) == sorted(run["name"] for run in runs) == ["a", "b", "c"]
    read.clear()
    assert all(asked(site, tag, tag) == (None, tag) for _ in range(5))
    assert read == []
    folder = tmp_path / "b"
    changes = {
        "history": lambda: History.resumed(folder / "history.csv", rows(3)).append(rows(4)[-1]),
        "config": lambda: (folder / "config.yaml").write_text("train: {epochs: 8}\n"),
        "failure": lambda: (folder / "failure.json").write_text('{"rank": 1, "cause": "nan"}'),
        "another failure": lambda: (folder / "failure-1.json").write_text('{"rank": 0, "cause": "exit"}'),
        "start": lambda: (folder / "starts.jsonl").write_text('{"event": "start", "at": 1.0}\n'),
        "same size and time, another file": lambda: swapped(folder / "config.yaml", "train: {epochs: 7}\n"),
    }
    for what, change in changes.items():
        read.clear()
        change()
        runs, after = asked(site, tag, tag)
        assert runs is not None, what
        assert [run if isinstance(run, str) else run["name"] + "!" for run in runs].count("b!") == 1, what
        assert sum(isinstance(run, str) for run in runs) == 2, what
        assert (read, after != tag) == (["b"], True), what
        tag = after
    assert asked(site, "0" * 16 + "-1")[0] == asked(site)[0], "a tag of another server says nothing"


def swapped(file: Path, text: str) -> None:
    """Puts another file of the same time in the place of one."""
    before = file.stat()
    other = file.with_name("other")
    other.write_text(text)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def test_runs_come_and_go(tmp_path: Path, read: list[str]) -> None:
    site = Site([], tmp_path / "runs")
    runs, tag = asked(site)
    assert runs == []
    folder = tmp_path / "runs/late"
    folder.mkdir(parents=True)
    assert asked(site, tag, tag) == (None, tag), "a folder with nothing in it"
    History(folder / "history.csv").append(rows(1)[0])
    runs, tag = asked(site, tag)
    assert runs is not None
    assert [run["name"] for run in runs] == ["late"]
    make_run(tmp_path / "runs/later", rows(2))
    os.utime(folder / "history.csv", (1, 1))
    runs, tag = asked(site, tag)
    assert runs is not None
    assert [run["name"] for run in runs] == ["later", "late"], "those that changed last come first"
    shutil.rmtree(tmp_path / "runs/later")
    runs, tag = asked(site, tag)
    assert runs == ["late"]
    assert len(site._known) == 1, "nothing is kept of what is gone"
    shutil.rmtree(tmp_path / "runs")
    assert asked(site, tag)[0] == []


def test_many_clients_share_one_look(tmp_path: Path, read: list[str]) -> None:
    for number in range(40):
        make_run(tmp_path / f"run-{number}", rows(2))
    site, tags = Site([], tmp_path), []
    threads = [threading.Thread(target=lambda: tags.append(asked(site)[1])) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(read), len(set(tags)), len(tags)) == (40, 1, 20)


def test_the_page_holds_what_the_data_does_and_no_markup_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path / "<!--<b>&", rows(2), config={"model": {"a": '"runs":[]</script><!--'}})
    site = Site([], tmp_path)
    page = b"".join(site.page()).decode()
    held = json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    parts, tag = site.data()
    assert held == json.loads(b"".join(parts or []))
    assert (held["tag"], held["runs"][0]["name"]) == (tag, "<!--<b>&")
    assert b"</script><!--" not in b"".join(parts or [])
