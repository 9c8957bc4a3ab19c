"""The batch script: whatever is in a value arrives as it is, and nothing of it is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import clean_environment
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.slurm.request import JobRequest
from dtrain.slurm.text import PER_NODE_END, PER_RANK_END, Script, output_file, output_pattern, quoted, script_text

BASH, SHELLCHECK = shutil.which("bash") or "/bin/bash", shutil.which("shellcheck") or ""
TEMPLATES = Path(__file__).parents[2] / "slurm"
AWKWARD = [
    "a b",
    "it's",
    '"quoted"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned; #",
    "${HOME}",
    "a\nb",
    "a\r\nb",
    "\t",
    "*",
    "~",
    "\\",
    "\\n",
    "!!",
    "größe=ø",
    "\x1b[31m\x07f",
    "\ud834",  # half of a character, as a program may make it
    "\udcff\udcfe",  # bytes that are no text
    "#SBATCH --nodes=9",
    "\n#SBATCH --nodes=9",
    "%j",
    "",
    "\u2028",
    "é\udcffé'1",
]
ARGUMENTS = st.one_of(
    st.binary(max_size=12).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"x"))),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.sampled_from([word for word in AWKWARD if word != "\ud834"]),
)
LINES = st.one_of(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12),
    st.sampled_from([word for word in AWKWARD if word.strip() and word.isprintable()]),
)


class Shell:
    """Runs scripts with a program in Python's place, which notes what it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "it's $(touch pwned) python"
        self.python.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
        self.python.chmod(0o755)

    def run(self, text: str, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
        script = self.folder / "script.sbatch"
        script.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [BASH, str(script), *words],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], **env},
            capture_output=True,
            check=False,
            timeout=30,
        )
        assert not (self.folder / "pwned").exists(), "something in a value was run"
        return done

    def argv(self, text: str, *words: str, **env: str) -> list[str]:
        done = self.run(text, *words, **env)
        assert (done.returncode, done.stderr) == (0, b"")
        return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"))


def text_of(shell: Shell, request: JobRequest, runs: Sequence[Sequence[str]], output: str = "/o") -> str:
    return script_text(request, Script(runs, output, str(shell.python), "rank python", "about\nit"))


def read_directives(text: str) -> dict[str, str]:
    """Reads #SBATCH lines as sbatch 22.05 does: quotes of both kinds, a backslash before anything, comments."""
    found: dict[str, str] = {}
    for line in text.split("\n"):
        if line.strip() and not line.startswith("#"):
            break  # sbatch reads no further than to the first command
        if line.startswith("#SBATCH"):
            name, _, value = _argument(line.removeprefix("#SBATCH").lstrip()).partition("=")
            assert name not in found, f"{name} twice"
            found[name] = value
    return found


def _argument(line: str) -> str:
    kept, quote, escaped = "", "", False
    for char in line:
        if escaped:
            kept, escaped = kept + char, False
        elif char == "\\":
            escaped = True
        elif quote and char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        elif not quote and (char.isspace() or char == "#"):
            break
        else:
            kept += char
    return kept


# How a batch script runs dtrain: not by -m, which puts the present folder first.
DTRAIN = [
    "-c",
    "import sys; sys.path[:1] = filter(None, sys.path[:1]); from dtrain.cli import main; main()",
]


def test_files_beside_the_recipe_do_not_take_the_place_of_pythons_own(tmp_path: Path) -> None:
    for name in ("random", "types", "utils", "queue", "contextlib"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the user file ' + __file__)\n")
    argv = [sys.executable, *DTRAIN, "train", "digits", "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, env=clean_environment())
    assert done.returncode == 0, done.stderr
    by_module = subprocess.run(
        [sys.executable, "-m", "dtrain", "--version"], cwd=tmp_path, capture_output=True, check=False
    )
    assert by_module.returncode != 0, "what this guards against"


@settings(max_examples=40)
@given(words=st.lists(ARGUMENTS, max_size=4), extra=ARGUMENTS, retries=st.sampled_from([0, 2]))
@example(words=[word for word in AWKWARD if word != "\ud834"], extra="", retries=0)
def test_every_word_arrives_unchanged(shell: Shell, words: list[str], extra: str, retries: int) -> None:
    asked = JobRequest("n", ranks=3, cpu=True, retries=retries, srun_args=(f"--x={extra}",), container=("in", extra))
    again = ["--retries", "2"] if retries else []
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", f"--x={extra}", "in", extra, "rank python", *DTRAIN]
    job = [*DTRAIN, "slurm-job", "--requeues", "3", *words, "--"]
    argv = shell.argv(text_of(shell, asked, [words]))
    assert argv == [*job, *srun, "launch", "-n", "3", "--cpu", *again, "--", "train", *words]
    srun[2] = "--wait=20"
    argv = shell.argv(text_of(shell, replace(asked, per_rank=True), [words]))
    assert argv == [*job, *srun, "train", "--cpu", *words]


@settings(max_examples=40)
@given(name=LINES, value=LINES)
def test_every_option_reaches_sbatch_unchanged(shell: Shell, name: str, value: str) -> None:
    asked = JobRequest(
        name, nodes=2, gpus_per_node="a100:4", time="1-2", account=value, sbatch_args=(f"--comment={value}",)
    )
    asked.check()
    folder = Path("/runs") / name.replace("\\", "x").replace("/", "x")
    found = read_directives(text_of(shell, asked, [["c.yaml"]], output_pattern(folder, array=False)))
    assert found == {
        "--job-name": name,
        "--account": value,
        "--comment": value,
        "--gpus-per-node": "a100:4",
        "--nodes": "2",
        "--ntasks-per-node": "1",
        "--cpus-per-task": "4",
        "--time": "1-2",
        "--output": str(folder).replace("%", "%%") + "/slurm/job-%j.out",
        "--open-mode": "append",
        "--requeue": "",
        "--signal": "B:USR1@120",
    }


def test_a_script_is_one_that_sbatch_takes() -> None:
    for word in AWKWARD:
        if word == "\ud834":
            with pytest.raises(UnicodeEncodeError):
                os.fsencode(word)  # no argument of any program
        else:
            assert not set(quoted(word)) & set("\r\n\0"), "sbatch refuses DOS line breaks"
            quoted(word).encode("utf-8")


def test_an_array_task_finds_its_own_words(shell: Shell) -> None:
    asked = JobRequest("n", tasks=2, at_once=1)
    text = text_of(shell, asked, [["c.yaml", "lr=1 2"], ["c.yaml", "lr=$(touch pwned)"]], "/o")
    assert read_directives(text)["--array"] == "0-1%1"
    assert shell.argv(text, SLURM_ARRAY_TASK_ID="1")[-2:] == ["c.yaml", "lr=$(touch pwned)"]
    for env in ({"SLURM_ARRAY_TASK_ID": "2"}, {}):
        done = shell.run(text, **env)
        assert done.returncode == 2
        assert b"no run for array task" in done.stderr


def test_the_environment_is_readied_first(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "set $(touch pwned) up.sh"
    text = text_of(shell, JobRequest("n", env_setup=file), [["c.yaml"]])
    file.write_text("export SLURM_CPUS_PER_TASK=7$NOT_SET\n: ${NOT_SET}\n")
    assert shell.argv(text)[-1] == "c.yaml"
    assert "\nset -u\n" in text.partition("up.sh")[2]
    file.write_text("export HALF=done\nfalse\n")
    done = shell.run(text)
    assert done.returncode == 2
    assert "up.sh exited with status 1" in done.stderr.decode()


def test_cpus_are_handed_on_to_srun(shell: Shell) -> None:
    shell.python.with_name("show").write_text('#!/bin/sh\nprintf "%s" "$SRUN_CPUS_PER_TASK"\n')
    shell.python.with_name("show").chmod(0o755)
    text = script_text(JobRequest("n"), Script([[]], "/o", str(shell.python.with_name("show")), "p"))
    assert shell.run(text, SLURM_CPUS_PER_TASK="8").stdout == b"8"
    assert shell.run(text).stdout == b"1"


def test_output_paths(tmp_path: Path) -> None:
    folder = tmp_path / "50% off"
    assert output_pattern(folder, array=False) == f"{tmp_path}/50%% off/slurm/job-%j.out"
    assert output_pattern(folder, array=True) == f"{tmp_path}/50%% off-%a/slurm/job-%A_%a.out"
    assert output_file(folder, "12_3") == folder / "slurm/job-12_3.out"
    for name in ("back\\slash", "line\nbreak"):
        with pytest.raises(UsageError, match="path"):
            output_pattern(tmp_path / name, array=False)


class TestTemplates:
    """slurm/*.sbatch, for use by hand, behave as what `dtrain submit` writes."""

    @pytest.mark.parametrize(("name", "end"), [("train", PER_NODE_END), ("train_per_rank", PER_RANK_END)])
    def test_they_end_as_written_ones_do(self, shell: Shell, name: str, end: str) -> None:
        text = (TEMPLATES / f"{name}.sbatch").read_text(encoding="utf-8")
        assert text.endswith(f"\n\n{end}")
        theirs = read_directives(text)
        mine = read_directives(text_of(shell, JobRequest("n", time="1:0:0", per_rank="rank" in name), [["c"]]))
        assert list(theirs) == list(mine)
        for option in ("--open-mode", "--requeue", "--signal"):
            assert theirs[option] == mine[option]

    def test_words_go_to_every_rank(self, shell: Shell) -> None:
        words = [word for word in AWKWARD if word != "\ud834"]
        text = (TEMPLATES / "train.sbatch").read_text(encoding="utf-8")
        argv = shell.argv(text, *words, PYTHON=str(shell.python), SLURM_GPUS_ON_NODE="8")
        assert argv[:5] == [*DTRAIN, "slurm-job", "--requeues", "3"]
        assert argv[5 : 5 + len(words)] == words
        assert argv[-len(words) - 5 :] == ["launch", "-n", "8", "--", "train", *words]
        assert shell.argv(text, PYTHON=str(shell.python), RANKS="2", SLURM_GPUS_ON_NODE="8")[-3] == "2"

    @pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
    def test_shellcheck_finds_nothing(self, shell: Shell, tmp_path: Path) -> None:
        asked = JobRequest("a b", tasks=2, env_setup=tmp_path / "it's", srun_args=("--x=a b",))
        for name, per_rank in (("array", False), ("per_rank", True)):
            # It would remark on $ in single quotes, which is as meant.
            text = script_text(replace(asked, per_rank=per_rank), Script([["it's", "a\nb"], ["ø"]], "/o", "p", "p"))
            (tmp_path / f"{name}.sbatch").write_text(text, encoding="utf-8")
        files = [*TEMPLATES.glob("*.sbatch"), *tmp_path.glob("*.sbatch")]
        done = subprocess.run([SHELLCHECK, *map(str, files)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
