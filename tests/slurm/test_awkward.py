"""Names and values that a shell would take for its own arrive as they are, or are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from helpers.cluster import Cluster
from helpers.queued import NO_GPU, RECIPES, TEMPLATES

EVIL = "$(touch injected) `touch injected`; touch injected & é 'q' \"d\" * ~ %j !"
VALUE = f"{EVIL}\n#SBATCH --hold\n\\ \t end"


def test_awkward_names_and_values(slurm: Cluster, tmp_path: Path) -> None:
    # SLURM itself would replace %j in the name of the folder that a job is sent from.
    folder = tmp_path / f"in {EVIL}".replace("%j", "")
    folder.mkdir()
    recipe = folder / f"recipe {EVIL}.py"
    shutil.copyfile(RECIPES / "faults.py", recipe)
    config = folder / f"config {EVIL}.yaml"
    config.write_text(yaml.safe_dump({"recipe": recipe.name, "train": {"epochs": 1}}, allow_unicode=True))
    mark = f"model.mark={json.dumps(VALUE)}"
    words = (config.name, mark, "model.phase=two\nlines", f"run.dir='{EVIL.replace(chr(39), 2 * chr(39))}'")
    here = slurm.dtrain("train", *words, "run.name=here", "--cpu", cwd=folder)
    assert here.code == 0, here.text
    runs = folder / EVIL
    names = (f"run {EVIL}", "by hand")
    one = slurm.dtrain("submit", *words, f"run.name={json.dumps(names[0])}", "--cpu", "--time", "10", cwd=folder)
    assert one.code == 0, one.text
    job = one.out.partition("submitted: job ")[2].split()[0]
    by_hand = (TEMPLATES / "train.sbatch", *words, f"run.name={names[1]}")
    other = slurm.sbatch("--nodes=1", "--time=10", *by_hand, cwd=folder, **NO_GPU)
    for name in (job, other):
        slurm.wait(name, "COMPLETED")
    assert (runs / names[0] / "slurm" / f"job-{job}.out").is_file()
    configs = [yaml.safe_load((runs / name / "config.yaml").read_text()) for name in ("here", *names)]
    assert configs[0]["model"]["mark"] == VALUE
    assert [one["model"] for one in configs] == [configs[0]["model"]] * 3
    assert [one["run"]["name"] for one in configs] == ["here", *names]
    assert list(tmp_path.rglob("injected")) == []


def test_what_cannot_be_is_refused_by_name(slurm: Cluster, tmp_path: Path) -> None:
    before = slurm.queue()
    cases = {
        'run.name="two\\nlines"': "run.name = 'two\\nlines' (command line): should be a plain folder name",
        "--job-name=two\nlines": "--job-name 'two\\nlines': should be text without line breaks",
        "--partition=main\n#SBATCH --hold": "--partition 'main\\n#SBATCH --hold': should be text without line breaks",
        "--sbatch-arg=--comment=two\nlines": "should be text without line breaks",
    }
    for word, told in cases.items():
        done = slurm.dtrain("submit", RECIPES / "faults.py", word, "--cpu", cwd=tmp_path)
        assert done.code == 2, done.text
        assert told in " ".join(done.err.split()), done.text
    assert list(tmp_path.iterdir()) == []
    assert slurm.queue() == before
