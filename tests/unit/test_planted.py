"""What others have put into a run's folder is not followed, not waited for, and not shown."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.callbacks.param_norms import NormsFile
from dtrain.callbacks.tracking.files import ABOUT, StepLog, write_json
from dtrain.checkpoint.folder import check_place, make_way, remove, verify, write_checkpoint
from dtrain.checkpoint.locate import FILES, find_good
from dtrain.config import load_settings
from dtrain.errors import CheckpointError, UsageError
from dtrain.files import make_folder, open_below, read_below, write_below
from dtrain.launch.monitor.postmortem import RankFailure
from dtrain.launch.terminal.rank_log import RankLog
from dtrain.layout import TRACKING, checkpoints_in
from dtrain.provenance.code import content_hash
from dtrain.provenance.kept import keep, read_kept
from dtrain.rundir.history import History
from dtrain.rundir.job_record import JobRecord, read_record, write_record
from dtrain.rundir.starts import noted
from dtrain.trainer.folder import open_folder

OWN = "the victim's own\n"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder and a file of somebody's own; neither is changed."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "bashrc").write_text(OWN)
    yield folder
    assert (folder / "bashrc").read_text() == OWN
    assert [path.name for path in folder.iterdir()] == ["bashrc"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "runs/x").mkdir(parents=True)
    return tmp_path / "runs/x"


def begin(run: Path) -> None:
    with noted(run, {}, lambda: 0):
        pass


def log(run: Path) -> None:
    one = RankLog(0)
    one.open(make_folder(run, "logs"))
    one.close()


def history(run: Path) -> None:
    History.resumed(run / "history.csv", [{"epoch": 1}]).append({"epoch": 2})


# What is planted, in the run's folder, and who writes there.
WRITERS: list[tuple[str, Callable[[Path], Any]]] = [
    ("starts.jsonl", begin),
    ("history.csv", history),
    (".history.csv.part", history),
    ("history.csv", lambda run: History.resumed(run / "history.csv", []).append({"epoch": 1})),
    ("norms.csv", lambda run: NormsFile(run / "norms.csv", 0).close()),
    ("logs", log),
    ("logs/rank-0.log", log),
    ("failure.json", lambda run: RankFailure(0, 0, "h", None, None, None, "", "exit").write(run)),
    (".failure.json.part", lambda run: RankFailure(0, 0, "h", None, None, None, "", "exit").write(run)),
    ("slurm", lambda run: write_record(run, JobRecord("1"))),
    ("slurm/job.json", lambda run: write_record(run, JobRecord("1"))),
    ("slurm/.job.json.part", lambda run: write_record(run, JobRecord("1"))),
    ("tracking", lambda run: StepLog(run).close()),
    ("tracking/steps.jsonl", lambda run: StepLog(run).close()),
    ("tracking/about.json", lambda run: write_json(make_folder(run, TRACKING) / ABOUT, {})),
    ("checkpoints", lambda run: write_checkpoint(run / "checkpoints", "epoch-1", {"a": [b"a"]}, {})),
    ("checkpoints/.epoch-1.part", lambda run: write_checkpoint(run / "checkpoints", "epoch-1", {"a": [b"a"]}, {})),
]


@pytest.mark.parametrize("to", ["bashrc", "", "nowhere"])
@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(WRITERS)])
def test_nothing_is_written_through_a_link(
    run: Path, victim: Path, name: str, write: Callable[[Path], Any], to: str
) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(victim / to)
    try:
        write(run)
    except (OSError, CheckpointError) as error:  # one clear error, or the link itself is replaced
        assert "symbolic link, which is not followed" in str(error) or "already exists" in str(error)
    else:
        assert not (run / name).is_symlink() or name in ("starts.jsonl",)


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(WRITERS)])
def test_nothing_is_written_through_a_hard_link(
    run: Path, victim: Path, name: str, write: Callable[[Path], Any]
) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    os.link(victim / "bashrc", run / name)
    with contextlib.suppress(OSError, CheckpointError):  # where a folder should be
        write(run)


@pytest.mark.parametrize("to", ["bashrc", "", "nowhere"])
@pytest.mark.parametrize("name", ["code", "code/1", "code/.1.part", "code/1/mine.py", "code/1/nets"])
def test_no_code_is_kept_through_a_link(run: Path, victim: Path, name: str, to: str) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(victim / to)
    copy = keep(run, {"mine.py": b"1", "nets/cnn.py": b"2"})
    assert copy is None or (run / "code" / copy / "nets/cnn.py").read_bytes() == b"2"
    assert (copy is None) == (name in ("code", "code/1", "code/1/nets"))


def test_code_is_not_shown_through_a_link_at_any_level(run: Path, victim: Path) -> None:
    (run / "code").mkdir()
    (run / "code/1").symlink_to(victim)
    assert read_kept(run / "code/1", "bashrc", content_hash(OWN.encode())) is None
    (run / "code/1").unlink()
    (run / "code/1").mkdir()
    (run / "code/1/nets").symlink_to(victim)
    assert read_kept(run / "code/1", "nets/bashrc", content_hash(OWN.encode())) is None


def test_a_backup_by_hard_links_keeps_what_it_had(run: Path, tmp_path: Path) -> None:
    """As `cp -al` and some snapshots make them; whoever may not read the file may not read the copy."""
    history = History(run / "history.csv")
    history.append({"epoch": 1})
    (run / "history.csv").chmod(0o600)
    os.link(run / "history.csv", tmp_path / "backup")
    history.append({"epoch": 2})
    assert (tmp_path / "backup").read_text() == "epoch\n1\n"
    assert (run / "history.csv").read_text() == "epoch\n1\n2\n"
    assert (run / "history.csv").stat().st_mode & 0o777 == 0o600
    os.link(run / "history.csv", tmp_path / "again")
    os.close(open_below(run, "history.csv", os.O_WRONLY | os.O_TRUNC))
    assert (run / "history.csv").read_text() == ""
    assert (tmp_path / "again").read_text() == "epoch\n1\n2\n"


def test_a_run_folder_that_is_a_link_itself_is_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "disk/x").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("disk")
    (tmp_path / "y").symlink_to("disk/x")
    for run in (tmp_path / "runs/x", tmp_path / "y"):
        begin(run)
        log(run)
        write_checkpoint(run / "checkpoints", f"epoch-{run.name == 'y':d}", {"a": [b"a"]}, {})
    assert {path.name for path in (tmp_path / "disk/x").iterdir()} == {"starts.jsonl", "logs", "checkpoints"}
    assert set(checkpoints_in(tmp_path / "y/checkpoints").values()) == {(0, None), (1, None)}


def test_what_is_removed_is_never_what_a_link_leads_to(run: Path, victim: Path) -> None:
    (run / "checkpoints").mkdir()
    (run / "checkpoints/epoch-1").symlink_to(victim)
    assert list(checkpoints_in(run / "checkpoints")) == [run / "checkpoints/epoch-1"]
    with pytest.raises(CheckpointError, match="symbolic link, which is not followed"):
        find_good(run / "checkpoints")
    remove(run / "checkpoints/epoch-1")
    assert list((run / "checkpoints").iterdir()) == []


def test_checkpoints_elsewhere_are_refused_before_anything_is_written(run: Path, victim: Path) -> None:
    (run / "checkpoints").symlink_to(victim)
    settings = load_settings(None, [f"run.dir={run.parent}", "run.name=x"], {})
    with pytest.raises(UsageError, match=r"checkpoints is a symbolic link.*put run\.dir or the run's folder"):
        open_folder(settings, "auto", lambda _: "", lambda _: None)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


def test_a_folder_is_looked_at_once_it_is_owned(run: Path) -> None:
    """Between its making and that, another process may have trained a whole run in it."""
    settings = load_settings(None, [f"run.dir={run.parent}", "run.name=y"], {})

    def own(folder: Path) -> None:
        files = {name: [b"{}"] for name in FILES}
        write_checkpoint(folder / "checkpoints", "epoch-5", files, {"format": 1, "epoch": 5, "step": None})

    opened = open_folder(settings, "auto", lambda _: "", own)
    assert opened.again
    assert opened.found is not None
    assert opened.found.saved.epoch == 5
    assert not (run.parent / "y/config.yaml").exists()
    settings = load_settings(None, [f"run.dir={run.parent}", "run.name=z"], {})
    with pytest.raises(UsageError, match="another process has started a run there"):
        open_folder(settings, "never", lambda _: "", own)


def test_a_copy_of_a_checkpoint_under_another_epochs_name_is_named(run: Path) -> None:
    import shutil

    files = {name: [b"{}"] for name in FILES}
    folder = run / "checkpoints"
    for epoch in (3, 4):
        write_checkpoint(folder, f"epoch-{epoch}", files, {"format": 1, "epoch": epoch, "step": None})
    shutil.copytree(folder / "epoch-3", folder / "epoch-9")
    shutil.copytree(folder / "epoch-3", folder / "epoch-4-step-7")
    for odd in ("epoch-04", "epoch-٥", "epoch-5-step-01", "epoch-" + "9" * 30):
        shutil.copytree(folder / "epoch-3", folder / odd)
    found = find_good(folder)
    assert found is not None
    assert found.saved.epoch == 4
    assert [path.name for path in found.newer] == ["epoch-9"]
    for path in (folder / "epoch-9", folder / "epoch-4"):  # a run that comes to these epochs meanwhile
        make_way(path)
    assert not (folder / "epoch-9").exists()
    assert (folder / ".epoch-9.damaged-1").is_dir()
    assert (folder / "epoch-4").is_dir()
    assert "epoch-9 contains the checkpoint epoch-3: it was copied or renamed" in found.words[0]
    with pytest.raises(CheckpointError, match="contains the checkpoint epoch-3"):
        check_place(folder / "epoch-4-step-7", verify(folder / "epoch-4-step-7"))


@pytest.mark.parametrize("kind", ["fifo", "folder", "socketless device", "large", "link", "loop", "missing"])
def test_what_is_no_plain_file_is_named_and_waited_for_by_nobody(run: Path, kind: str) -> None:
    path, most, words = run / "it", 1 << 20, "it is a "
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socketless device":
        path = Path("/dev/zero")
    elif kind == "large":
        path.write_bytes(b"x" * 11)
        most, words = 10, "larger than the limit of 10 bytes"
    elif kind in ("link", "loop"):
        path.symlink_to("/etc/passwd" if kind == "link" else "it")
        words = "symbolic link, which is not followed"
    else:
        words = "No such file"
    with pytest.raises(OSError, match=words):
        read_below(path.parent, path.name, most)
    if kind in ("fifo", "folder", "link", "loop"):
        with pytest.raises(OSError, match=words):
            os.close(open_below(run, "it", os.O_WRONLY | os.O_APPEND | os.O_CREAT))
        with pytest.raises(OSError, match=words):
            os.close(open_below(run, "it", os.O_WRONLY | os.O_TRUNC))


def test_a_fifo_in_a_checkpoint_is_damage(run: Path) -> None:
    write_checkpoint(run / "checkpoints", "epoch-1", {"a": [b"a"]}, {"epoch": 1})
    for name in ("a", "manifest.json"):
        (run / "checkpoints/epoch-1" / name).unlink()
        os.mkfifo(run / "checkpoints/epoch-1" / name)
        with pytest.raises(CheckpointError, match="it is a FIFO, not a file"):
            verify(run / "checkpoints/epoch-1")
        if name == "a":
            (run / "checkpoints/epoch-1/a").unlink()
            (run / "checkpoints/epoch-1/a").write_bytes(b"a")
    (run / "slurm").mkdir()
    os.mkfifo(run / "slurm/job.json")
    with pytest.raises(UsageError, match="it is a FIFO, not a file"):
        read_record(run)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_files_follow_the_umask(run: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        begin(run)
        history(run)
        log(run)
        write_below(run, "config.yaml", "a: 1\n")
        write_record(run, JobRecord("1"))
        write_checkpoint(run / "checkpoints", "epoch-1", {"a": [b"a"]}, {})
        NormsFile(run / "norms.csv", 0).close()
    finally:
        os.umask(before)
    for path in run.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_manifest_names_no_file_outside(run: Path) -> None:
    write_checkpoint(run / "checkpoints", "epoch-1", {"a": [b"a"]}, {})
    text = (run / "checkpoints/epoch-1/manifest.json").read_text()
    from dtrain.checkpoint import folder

    facts = json.loads(text)
    facts["files"] = {"../../../home/x": facts["files"]["a"]}
    del facts["seal"]
    (run / "checkpoints/epoch-1/manifest.json").write_bytes(folder._sealed(facts))
    with pytest.raises(CheckpointError, match="lists a file outside of the checkpoint"):
        verify(run / "checkpoints/epoch-1")
