"""The command line helps: an example for each verb, the nearest name for a wrong one, completion."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from helpers.commands import BIN, Dtrain, clean_environment
from helpers.parsing import commands_of, parse, root, verbs
from helpers.slurm_fakes import Slurm
from helpers.sweep import some

from dtrain.cli.app import app, needed
from dtrain.config.variables import ignored_variables
from dtrain.launch.signals.stop_request import STOP_SIGNALS
from dtrain.rundir.job_record import JobRecord, write_record

_GROUPS = {"": root()} | {name: command for name, command in root().commands.items() if hasattr(command, "commands")}


@pytest.mark.parametrize("verb", [*_GROUPS, *sorted(verbs())])
def test_the_help_of_every_verb_ends_in_examples_that_parse(verb: str) -> None:
    words = " ".join(((_GROUPS | verbs())[verb].help or "").split())
    head, _, examples = re.sub(r"\bExamples?: ", "Example: ", words).partition("Example: ")
    assert head, "what it does"
    assert examples, "no example"
    lines = examples.split("; ")
    for line in lines:
        assert line.startswith(f"dtrain {verb}".rstrip()), line
        assert commands_of(line), line
        parse(line)


def test_the_root_s_help_names_every_verb() -> None:
    top = {name.partition(" ")[0] for name in verbs()}
    assert top == {name for name, command in root().commands.items() if not command.hidden}


def test_a_command_line_has_its_own_verb_made_and_no_other() -> None:
    """To make all takes each rank 0.1 s."""
    for name, command in root().commands.items():
        alone = typer.main.get_command(needed([name, "--help"]))
        assert alone.commands.keys() == {name}
        assert alone.params[0].opts == ["--version"]
        pages = [
            one.get_help(one.make_context(f"dtrain {name}", [], resilient_parsing=True))
            for one in (command, alone.commands[name])
        ]
        assert pages[0] == pages[1]
    for words in ([], ["--help"], ["trian"], ["--version", "train"]):
        assert needed(words) is app


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_option_has_words_and_none_are_lost_as_markup(verb: str) -> None:
    """`[rank N]` is markup of rich's, unless a backslash is before it."""
    for option in verbs()[verb].params:
        text = getattr(option, "help", None) or ""
        assert text or option.hidden, f"{option.name} has no words"
        for bracket in re.finditer(r"\[[a-z/#@][^\]]*\]", text):
            assert text[: bracket.start()].endswith("\\"), f"{option.name}: {text}"


def test_the_help_is_shown_whole(dtrain: Dtrain) -> None:
    done = dtrain("train", "--help", COLUMNS="120")
    assert done.code == 0
    assert "each line prefixed with [rank N]." in done.out
    assert "Examples: dtrain train" in done.out


@pytest.fixture
def handlers_kept() -> Iterator[None]:
    """`dtrain train` hears requests to stop, and ignores them on its way out; this process goes on."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_kept")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "Did you mean 'train'?"),
        ("check partiy", "Did you mean 'parity'?"),
        ("train --rnaks 2", "--ranks"),
        ("train --epochs 5", "No such option: --epochs. Write values without dashes: epochs=5"),
        ("train --batch-size=64 -n 2", "without dashes: batch_size=64"),
        ("train there.py --depth -3", "without dashes: depth=-3"),
        ("train --optimizer.lr --cpu", "without dashes: optimizer.lr=..."),
        ("train --nothing", "Write config and recipe values without dashes"),
        ("submit --train.seed 3", "without dashes: train.seed=3"),
        ("find lr there.py --depth 3", "without dashes: depth=3"),
        ("check parity --epochs 5", "without dashes: epochs=5"),
        ("evaluate runs/third --depth 3", "without dashes: depth=3"),
        ("train train.epoch=5", "Did you mean 'epochs'?"),
        ("train epoch=5", "Did you mean 'epochs'?"),
        ("train trian.epochs=5", "Did you mean 'train'?"),
        ("train checkpoint.keep_lats=5", "Did you mean 'keep_last'?"),
        ("train model.droput=0", "Did you mean 'dropout'?"),
        ("train droput=0", "Did you mean 'dropout'?"),
        ("train digits --dry-run train.shard=fsdp train.shard_modules=[Conv3d]", "Did you mean 'Conv2d'?"),
        ("train digts", "Did you mean 'digits'?"),
        ("train mien.py", "Did you mean 'mine.py'?"),
        ("launch trian", "Did you mean 'train'?"),
        ("history secnod", "Did you mean 'second'?"),
        ("evaluate runs/secnod", "Did you mean 'second'?"),
    ],
)
def test_what_is_wrong_is_answered_with_the_nearest_name(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # which loading a recipe sets
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "runs" / "second").mkdir(parents=True)
    (tmp_path / "runs" / "second" / "config.yaml").write_text("")
    (tmp_path / "there.py").write_text("raise SystemExit\ndef build_model(depth=1): ...\n")
    (tmp_path / "runs" / "third").mkdir()
    (tmp_path / "runs" / "third" / "config.yaml").write_text(f"recipe: {tmp_path / 'there.py'}\n")
    with pytest.raises(SystemExit) as end:
        root()(line.split(), prog_name="dtrain")
    assert end.value.code == 2
    told = re.sub(r"[\s│]+", " ", capsys.readouterr().err)  # the lines of a box
    assert said in told


@pytest.mark.usefixtures("handlers_kept")
def test_a_wrong_variable_is_answered_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DTRAIN_TRAIN__EPOHCS", "3")
    with pytest.raises(SystemExit):
        root()(["train", "--dry-run"], prog_name="dtrain")
    assert "Did you mean 'epochs'?" in capsys.readouterr().err


def test_a_variable_that_nothing_reads_is_told_once(dtrain: Dtrain, tmp_path: Path) -> None:
    variables = {"DTRAIN_EPOHCS": "3", "DTRAIN_RDZV_TIMEOUT": "60", "DTRAIN_TRAIN__SEED": "1", "DTRAIN_JOB": "a"}
    for words in (["train", "--dry-run"], ["launch", "-n", 1, "--cpu", "--dry-run", "--", "train"]):
        done = dtrain(*words, **variables)
        told = "dtrain: DTRAIN_EPOHCS is ignored: dtrain has no such variable. Did you mean 'DTRAIN_TRAIN__EPOCHS'?"
        assert (done.code, done.err.splitlines()) == (0, [told])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DTRAIN_TRAIN_EPOCHS", "DTRAIN_TRAIN__EPOCHS"),
        ("DTRAIN_RDVZ_TIMEOUT", "DTRAIN_RDZV_TIMEOUT"),
        ("DTRAIN_RUN_DIR", "DTRAIN_RUN__DIR"),
        ("DTRAIN_OPTIMIZER_LR", "DTRAIN_OPTIMIZER__LR"),
    ],
)
def test_the_variable_that_was_meant(name: str, meant: str) -> None:
    (told,) = ignored_variables({name: "1", meant: "1", "DTRAIN_REPORT_DIR": "x", "DTRAIN_SUPERVISOR_PID": "7"})
    assert told == f"{name} is ignored: dtrain has no such variable. Did you mean {meant!r}?"
    assert "DTRAIN_SECTION__KEY" in ignored_variables({"DTRAIN_XYZZY": "1"})[0]


def test_what_a_verb_writes_is_named_alike_and_the_old_name_is_heard() -> None:
    for old in ("--out", "--output", "-o"):
        context = verbs()["predict"].make_context("predict", ["runs/it", old, "x.csv"])
        assert context.params["out"] == Path("x.csv")
    for name in ("predict", "report", "plot", "find lr"):
        (option,) = (option for option in verbs()[name].params if "-o" in option.opts)
        assert option.opts == ["-o", "--out"], name


_COMPLETE = """
import sys
from dtrain.cli import main
try:
    main()
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "pandas", "wandb", "accelerate"}))
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    some(
        [("dtrain tr", "train"), ("dtrain train --dry", "--dry-run")],
        [("dtrain check par", "parity"), ("dtrain evaluate --checkpoint la", "last")],
    ),
)
def test_completion_offers_names_and_loads_nothing_heavy(words: str, offered: str) -> None:
    """By the protocol that the shell's own function speaks, as `dtrain --show-completion` prints it."""
    number = len(words.split()) - 1
    env = clean_environment(_DTRAIN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(number))
    argv = [sys.executable, "-c", f"import sys; sys.argv[0] = 'dtrain'\n{_COMPLETE}"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    *names, loaded = done.stdout.splitlines()
    assert names == [offered], done.stderr
    assert loaded == "loaded:"


def test_the_shell_s_function_can_be_shown() -> None:
    """For the shell that dtrain was started by."""
    env = clean_environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    argv = [str(BIN / "dtrain"), "--show-completion", "bash"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "_DTRAIN_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize("line", some(["jobs", "report -o -"], ["train --dry-run", "history one", "summary"]))
def test_a_reader_that_has_gone_is_no_failure(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `dtrain jobs | head -1`, at its worst: nobody reads at all."""
    Slurm(tmp_path, monkeypatch)
    run = tmp_path / "runs" / "one"
    write_record(run, JobRecord(job="7", submitted=time.time()))
    (run / "history.csv").write_text("epoch,loss\n1,0.5\n")
    env = clean_environment()
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    there = subprocess.run([BIN / "dtrain", "jobs"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert there.stdout.splitlines()[1].startswith("7"), there.stdout
    reading, writing = os.pipe()
    os.close(reading)
    argv = [BIN / "dtrain", *line.split()]
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == 0, done.stderr
