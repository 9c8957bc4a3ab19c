"""`dtrain submit`, with a program of ours in the place of sbatch."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import BIN, Dtrain

from dtrain.cli.submit import _checked
from dtrain.config import load_settings
from dtrain.errors import ConfigError, SlurmError, UsageError
from dtrain.provenance.code import content_hash
from dtrain.rundir.job_record import JobAttempt, JobRecord, read_record, write_record
from dtrain.slurm.freeze import find_code
from dtrain.slurm.submission import PlannedRun, check_folders, code_of, frozen_words, plan_runs, submit_runs, word

RECIPE = """\
def build_model(width: int = 1): ...
def build_dataloaders(): ...
def train_step(model, x): ...
def valid_step(model, x): ...
"""

BUILT = """\
import torch
def build_model(width: int = 1):
    return torch.nn.Linear(2, width)
def build_dataloaders():
    x = torch.zeros(30, 2)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 4), None
def train_step(model, x): ...
"""

TOLD = """\
submitted: job 123
run:       runs/ø $(x)
watch:     dtrain jobs
output:    dtrain logs 123 -f
end:       dtrain cancel 123
"""


class Slurm:
    """SLURM's commands: they note what they were given, and answer what they are told to."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.noted = folder / "noted.jsonl"
        self.answers("sbatch", "123")
        self.answers("squeue", "")

    @property
    def path(self) -> str:
        return f"{self.bin}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"

    def answers(self, name: str, text: str, code: int = 0) -> None:
        note = "{'argv': sys.argv, 'cwd': os.getcwd(), 'names': sorted(os.environ), 'script': script}"
        (self.bin / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"script = open(sys.argv[-1]).read() if {name == 'sbatch'} else ''\n"
            f"open({str(self.noted)!r}, 'a').write(json.dumps({note}) + chr(10))\n"
            f"print({text!r}, file=sys.stderr if {code} else sys.stdout)\nsys.exit({code})\n"
        )
        (self.bin / name).chmod(0o755)

    def calls(self, name: str = "sbatch") -> list[dict[str, Any]]:
        lines = self.noted.read_text().splitlines() if self.noted.exists() else []
        return [one for line in lines if Path((one := json.loads(line))["argv"][0]).name == name]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("mine.py").write_text(RECIPE)
    Path("mine.yaml").write_text("recipe: mine.py\nmodel: {width: 2}\n")
    found = Slurm(tmp_path)
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # where a recipe's folder goes
    return found


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestCommand:
    def test_it_writes_submits_and_says_what_comes_next(self, slurm: Slurm) -> None:
        dtrain = Dtrain(Path.cwd())
        options = ["--nodes", 2, "-n", 2, "--cpu", "--time", "4:00:00", "--no-check", "--sbatch-arg=--comment=a b"]
        done = dtrain(
            "submit", "mine.yaml", "model.width=3", "run.name=ø $(x)", *options, PATH=slurm.path, SBATCH_QOS="x"
        )
        assert done.code == 0, done.text
        (call,) = slurm.calls()
        script = Path("runs/ø $(x)/slurm/train.sbatch").resolve()
        assert call["argv"][1:] == ["--parsable", str(script)]
        assert (call["cwd"], call["script"]) == (str(Path.cwd()), script.read_text())
        assert "SBATCH_QOS" not in call["names"]
        assert "note: SBATCH_QOS in the environment is ignored" in done.err
        assert '#SBATCH --comment="a b"' in call["script"]
        assert "    'run.name=ø $(x)'\n" in call["script"]
        assert "2 nodes x 2 ranks = 4 on CPUs" in done.out
        assert done.out.endswith(TOLD)
        record = read_record(script.parents[1])
        assert record is not None
        assert (record.job, record.script, record.name) == ("123", str(script), "ø $(x)")
        assert record.output == str(script.parent / "job-123.out")
        assert (record.folder, record.submitted is not None) == (str(Path.cwd()), True)
        assert record.submitted is not None
        assert abs(record.submitted - time.time()) < 60

    def test_a_dry_run_prints_the_script_and_writes_nothing(self, slurm: Slurm) -> None:
        dtrain = Dtrain(Path.cwd())
        grid = ["--array", "lr=1e-3,1e-4 model.width=[1],[2]", "--at-once", 2, "--freeze"]
        done = dtrain("submit", "mine.py", *grid, "--dry-run", "--no-check", PATH=slurm.path)
        assert done.code == 0, done.text
        assert done.out.startswith("#!/bin/bash\n")
        assert "#SBATCH --array=0-3%2" in done.out
        assert "copied: 2 files" in done.err
        assert (files(Path.cwd()), slurm.calls()) == (["mine.py", "mine.yaml"], [])

    def test_what_sbatch_refuses_leaves_nothing_behind(self, slurm: Slurm) -> None:
        slurm.answers("sbatch", "sbatch: error: invalid partition specified: gpu", 1)
        done = Dtrain(Path.cwd())("submit", "mine.py", "run.dir=a/b", "--no-check", PATH=slurm.path)
        assert (done.code, done.out.count("\n")) == (1, 2)
        assert "invalid partition specified: gpu" in done.err
        assert files(Path.cwd()) == ["mine.py", "mine.yaml"]
        assert not Path("a").exists()

    def test_a_job_runs_a_copy_unless_it_is_not_wanted(self, slurm: Slurm) -> None:
        dtrain, options = Dtrain(Path.cwd()), ["run.name=it", "--no-check"]
        text = Path("mine.py").read_text()
        done = dtrain("submit", "mine.py", *options, PATH=slurm.path)
        assert done.code == 0 and "copied: 2 files" in done.out, done.text
        copy = Path("runs/it/slurm/code/mine.py").resolve()
        assert f"    {copy}\n" in slurm.calls()[-1]["script"]
        Path("mine.py").write_text(text + "changed = 1\n")
        assert copy.read_text() == text
        done = dtrain("submit", copy, *options, PATH=slurm.path)  # as its config.yaml would name it
        assert done.code == 0 and copy.read_text() == text, done.text
        done = dtrain("submit", "mine.py", *options, "--no-freeze", PATH=slurm.path)
        assert "    mine.py\n" in slurm.calls()[-1]["script"] and "frozen" not in done.text
        Path("pkg").mkdir()
        Path("pkg/mine.py").write_text(text)
        done = dtrain("submit", "recipe=pkg.mine", "run.name=other", "--no-check", PATH=slurm.path)
        assert done.code == 0 and "note: the code is not copied, so the job runs it as it is at its start" in done.err

    def test_the_recipe_is_built_first(self, slurm: Slurm) -> None:
        Path("mine.py").write_text(BUILT)
        options = ["--nodes", 2, "-n", 2, "--cpu", "--array", "width=1,2"]
        done = Dtrain(Path.cwd())("submit", "mine.py", *options, PATH=slurm.path)
        assert done.code == 0, done.text
        assert "batch: 4 per rank, 16 global (of mine-" in done.out
        assert "steps: 2 per epoch, 6 optimizer steps in 3 epochs (of mine-" in done.out
        assert "submitted: job 123" in done.out
        first, second = sorted(Path("runs").iterdir())
        assert (first.name[-2:], second.name[-2:]) == ("-0", "-1")
        found = read_record(second)
        assert found is not None
        assert (found.job, found.output) == ("123_1", str(second.resolve() / "slurm/job-123_1.out"))

    @pytest.mark.parametrize(("words", "told"), [("width=64x", "model.width = '64x'"), ("wide=1", "a key 'wide'")])
    def test_every_run_of_an_array_is_checked(self, slurm: Slurm, words: str, told: str) -> None:
        Path("mine.py").write_text(BUILT)
        settings = [load_settings("mine.py", [word], environ={}) for word in ("width=1", words)]
        with pytest.raises(ConfigError, match=told):
            _checked(planned("mine.py", grid=[["width=1"], [words]]), settings, 4)

    def test_a_run_that_would_not_be_gone_on_with_is_refused_now(self, slurm: Slurm) -> None:
        Path("mine.py").write_text(BUILT)
        (run,) = runs = planned("mine.py", "run.name=it")
        settings = [load_settings("mine.py", ["run.name=it", "width=1"], environ={})]
        _checked(runs, settings, 4)
        before = {
            "config": settings[0].plain(),
            "recipe": {"name": "mine.py", "content": content_hash(BUILT.encode())},
            "data": {},
            "ranks": 4,
        }
        manifest = run.folder / "checkpoints/epoch-2/manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps(before | {"dtrain": "", "torch": "", "device": "cuda"}))
        _checked(runs, settings, 4)
        with pytest.raises(UsageError, match="the run had 4 ranks and now has 2"):
            _checked(runs, settings, 2)
        with pytest.raises(UsageError, match=r"model\.width was 1 and is 2"):
            _checked(runs, [load_settings("mine.py", ["run.name=it", "width=2"], environ={})], 4)
        manifest.unlink()
        (run.folder / "config.yaml").write_text(settings[0].to_yaml())
        with pytest.raises(UsageError, match=r"another run without a checkpoint: model\.width was 1 and is 2"):
            _checked(runs, [load_settings("mine.py", ["run.name=it", "width=2"], environ={})], 4)


def planned(*words: str, grid: list[list[str]] | None = None) -> list[PlannedRun]:
    return plan_runs(words, load_settings(words[0], words[1:], environ={}), grid)


class TestRuns:
    def test_the_name_is_fixed_at_submission(self, slurm: Slurm) -> None:
        (run,) = planned("mine.py")
        assert run.name.startswith("mine-20")
        assert run.words == ("mine.py", "run.dir=runs", f"run.name={run.name}")
        run.folder.mkdir(parents=True)
        assert planned("mine.py")[0].name != run.name
        (run,) = planned("mine.py", "run.name=it", "run.dir=here")
        assert (run.words, run.folder) == (("mine.py", "run.name=it", "run.dir=here"), Path("here/it"))

    def test_an_arrays_runs_have_folders_of_their_own(self, slurm: Slurm) -> None:
        runs = planned("mine.py", "run.name=it", grid=[["lr=1"], ["lr=2"]])
        assert [run.folder for run in runs] == [Path("runs/it-0"), Path("runs/it-1")]
        assert runs[1].words == ("mine.py", "run.name=it", "lr=2", "run.dir=runs", "run.name=it-1")

    @pytest.mark.parametrize(
        "name", ["007", "a b", "[x", "'a", '"', "null", "1e3", "# x", "a: b", "ø", "!x", "&a", "- a"]
    )
    def test_any_name_reads_back_as_it_was(self, slurm: Slurm, name: str) -> None:
        assert load_settings("mine.py", [word("run.name", name)], environ={}).config.run.name == name

    def test_a_run_whose_job_is_in_the_queue_is_refused(self, slurm: Slurm) -> None:
        runs = planned("mine.py", "run.name=it", grid=[["lr=1"], ["lr=2"]])
        write_record(runs[1].folder, JobRecord("77_1", name="it-1"))
        check_folders(runs)
        slurm.answers("squeue", "77_0 RUNNING\n77_1 PENDING\n771 RUNNING")
        with pytest.raises(UsageError, match=r"run it-1: its job 77_1 is in the queue \(pending\).*dtrain cancel 77_1"):
            check_folders(runs)
        assert "--array" in slurm.calls("squeue")[-1]["argv"], "else it has a line for several tasks that wait"
        check_folders(runs, ask_queue=False)

    def test_a_folder_that_cannot_be_gone_on_with_is_refused(self, slurm: Slurm) -> None:
        runs = planned("mine.py", "run.name=it")
        runs[0].folder.mkdir(parents=True)
        check_folders(runs)
        (runs[0].folder / "else.txt").touch()
        with pytest.raises(UsageError, match="it contains no run"):
            check_folders(runs)
        (runs[0].folder / "config.yaml").touch()
        check_folders(runs)
        (runs[0].folder / "STOP").touch()
        with pytest.raises(UsageError, match="this run was stopped for good"):
            check_folders(runs)
        with pytest.raises(UsageError, match="it is not a folder"):
            check_folders([PlannedRun("mine.py", Path("mine.py"), ())])


class TestWriting:
    def test_a_run_that_is_submitted_again_keeps_its_past(self, slurm: Slurm) -> None:
        (run,) = planned("mine.py", "run.name=it")
        past = JobAttempt(0, "77", "n1", 1.0, 2.0, 1, "failed", (1.0, 2.0, 3))
        write_record(run.folder, JobRecord("77", 1.0, "old", "old", "it", (past,)))
        (run.folder / "slurm/cancel").touch()
        assert submit_runs([run], "#!/bin/sh\n", None, None) == "123"
        record = read_record(run.folder)
        assert record is not None
        assert (record.job, record.incarnations, record.forgiven) == ("123", (past,), 1)
        assert files(run.folder) == ["slurm/job.json", "slurm/train.sbatch"]

    def test_a_failed_submission_brings_back_what_was_there(self, slurm: Slurm) -> None:
        (run,) = planned("mine.yaml", "run.name=it")
        code = find_code(Path("mine.py"))
        submit_runs([run], "first", code, Path("mine.yaml"))
        before = {name: (run.folder / name).read_bytes() for name in files(run.folder)}
        assert set(before) == {
            f"slurm/{name}" for name in ("code/mine.py", "config.yaml", "job.json", "train.sbatch")
        } | {"slurm/code/mine.yaml"}
        Path("mine.py").write_text("later")
        slurm.answers("sbatch", "no", 1)
        with pytest.raises(SlurmError, match="no"):
            submit_runs([run], "second", code, Path("mine.yaml"))
        assert {name: (run.folder / name).read_bytes() for name in files(run.folder)} == before
        slurm.answers("sbatch", "124")
        submit_runs([run], "second", None, None)
        assert files(run.folder) == ["slurm/job.json", "slurm/train.sbatch"]

    def test_a_folder_that_cannot_be_made_is_named(self, slurm: Slurm) -> None:
        with pytest.raises(UsageError, match=r"mine\.py/it: cannot be written"):
            submit_runs([PlannedRun("it", Path("mine.py/it"), ())], "", None, None)


class TestFrozen:
    def test_words_name_the_copies(self, slurm: Slurm) -> None:
        here = Path.cwd() / "runs/it/slurm"
        (run,) = planned("mine.yaml", "run.name=it")
        copy = f"recipe={here}/code/mine.py"
        assert frozen_words(run, "mine.py").words == (f"{here}/config.yaml", "run.name=it", "run.dir=runs", copy)
        (run,) = planned("mine.py", "run.name=it")
        assert frozen_words(run, "mine.py").words == (f"{here}/code/mine.py", "run.name=it", "run.dir=runs")
        (run,) = planned("digits", "run.name=it")
        assert frozen_words(run, None) == run

    def test_a_module_is_either_installed_or_refused(self, slurm: Slurm) -> None:
        assert code_of(load_settings("digits", [], environ={})) is None
        with pytest.raises(UsageError, match=r"Name its file instead.*recipe=mine\.py"):
            code_of(load_settings("mine", [], environ={}))
