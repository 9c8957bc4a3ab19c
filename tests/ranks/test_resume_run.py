"""What a run resuming from, and what it refuses: `train_run` in this process."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some

from dtrain.checkpoint.folder import write_checkpoint
from dtrain.checkpoint.locate import FILES, find_good, read
from dtrain.checkpoint.tree import flatten
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import AgreedError
from dtrain.rundir.history import read_history
from dtrain.rundir.starts import read_starts
from dtrain.trainer.train import train_run

RECIPES = Path(__file__).parent.parent / "recipes"


def start(
    folder: Path, *words: str, resume: str = "auto", recipe: Path | None = None, world: World | None = None
) -> Path:
    recipe = recipe or RECIPES / "resumable.py"
    settings = load_settings(str(recipe), [f"run.dir={folder}", "run.name=it", "epochs=2", *words], environ={})
    return train_run(settings, world or bring_up(cpu=True), resume)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("trained"), "checkpoint.every_steps=5", "checkpoint.keep_last=9")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "it"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=7"], "train.seed was 42 and is 7 (command line)"),
        (["optimizer.lr=0.5"], "optimizer.lr was 0.01 and is 0.5 (command line)"),
        (["model.hidden=9"], "model.hidden was 6 and is 9"),
        (["data.n=20"], "the number of train samples was 48 and is 20"),
        (["accumulation=3", "seed=7"], "train.seed was 42 and is 7 (command line); train.accumulation was 1 and is 3"),
    ],
)
def test_another_runs_values_are_refused_by_name_and_nothing_is_touched(run: Path, words: list[str], told: str) -> None:
    before = contents(run)
    with pytest.raises(AgreedError) as refused:
        start(run.parent, *words)
    assert told in str(refused.value)
    assert (
        "Keys that don't affect results, such as train.epochs, may change (all of them: docs/checkpoints.md)."
        in str(refused.value)
    )
    assert "hang_seconds" not in str(refused.value), "not a list of all that is not to be looked at"
    assert refused.value.exit_code == 2
    assert contents(run) == before


def test_values_that_change_no_number_may_differ(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = ["epochs=3", "log_step_freq=1", "checkpoint.keep_last=4", "early_stopping.patience=50"]
    start(run.parent, *free, "optimizer.lr=0.01")  # as the builder's default says
    assert f"resuming from {run}/checkpoints/epoch-2" in capsys.readouterr().out
    assert read_history(run)["epoch"].tolist() == [1, 2, 3]
    assert "epochs: 3" in (run / "config.yaml").read_text()


def test_a_complete_run_stays_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    start(run.parent)
    said = capsys.readouterr().out
    assert "is complete: 2 epochs" in said and "resuming from" not in said
    after = contents(run)
    config = "config.yaml"
    assert {k: v for k, v in after.items() if k != config} == {k: v for k, v in before.items() if k != config}


def test_never_refuses_a_folder_that_is_there(run: Path) -> None:
    before = contents(run)
    with pytest.raises(AgreedError, match="already exists and is not overwritten"):
        start(run.parent, resume="never")
    assert contents(run) == before


def test_a_recipe_that_has_changed_needs_a_word(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (RECIPES / "resumable.py").read_text()
    changed = tmp_path / "resumable.py"
    changed.write_text(text.replace("loss = ", "loss = 2 * ", 1))
    before = contents(run)
    for resume in ("auto", str(run)):
        with pytest.raises(
            AgreedError, match=r"resumable\.py has changed: train_step, line \d+: `loss = 2 \*"
        ) as refused:
            start(run.parent, "epochs=3", recipe=changed, resume=resume)
        assert "accept=code" in str(refused.value) and f"the original is in {run}/code/1" in str(refused.value)
    assert contents(run) == before
    start(run.parent, "epochs=3", "accept=code", recipe=changed)
    assert "accepted: resumable.py has changed: train_step" in caplog.text
    assert read_history(run)["epoch"].tolist() == [1, 2, 3]
    assert (run / "code/2/resumable.py").read_text() == changed.read_text()
    accepted = ["resumable.py has changed: train_step"]
    facts = json.loads((run / "checkpoints/epoch-3/manifest.json").read_text())
    assert [[path, *(word[:36] for word in words)] for path, *words in facts["accepted"]] == [
        [str(run / "checkpoints/epoch-2"), *accepted]
    ]
    assert [word[:36] for word in read_starts(run)[-1].facts["accepted"]] == accepted
    assert "accept" not in (run / "config.yaml").read_text(), "it is of one command"
    start(run.parent, "epochs=4", recipe=changed)
    with pytest.raises(AgreedError, match="has changed: train_step"):
        start(run.parent, "epochs=5")


def test_comments_and_formatting_do_not_count(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "resumable.py"
    changed.write_text("# mine\n\n" + (RECIPES / "resumable.py").read_text().replace("loss = ", "loss   =  "))
    start(run.parent, "epochs=3", recipe=changed)
    shutil.rmtree(run / "code")
    changed.write_text(changed.read_text() + "# and so\n")
    with pytest.raises(AgreedError, match="its copy is missing"):
        start(run.parent, "epochs=4", recipe=changed)


def test_a_checkpoint_of_an_older_dtrain_is_resumed_with_a_note(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = run / "checkpoints/epoch-2"
    loaded = find_good(run / "checkpoints")
    assert loaded is not None
    parts = read(last).loaded()
    files = {name: [(last / name).read_bytes()] for name in FILES}
    state = json.loads((last / "state.json").read_text())
    state["dict"] += [[name, flatten(parts.run[name], name)[0]] for name in ("rows", "validations")]
    files["state.json"] = [json.dumps(state).encode()]
    facts = {name: value for name, value in loaded.saved.facts.items() if name not in ("code", "samples", "accepted")}
    content = hashlib.sha256((RECIPES / "resumable.py").read_bytes()).hexdigest()[:12]
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "code")
    facts |= {"format": 1, "recipe": {"name": "resumable.py", "content": content}}
    write_checkpoint(run / "checkpoints", "epoch-2", files, facts)
    changed = tmp_path / "resumable.py"
    changed.write_text((RECIPES / "resumable.py").read_text() + "\n# changed\n")
    with pytest.raises(AgreedError, match=r"the content of resumable\.py has changed \(comments count"):
        start(run.parent, "epochs=3", recipe=changed)
    start(run.parent, "epochs=3")
    assert "the checkpoint is from an older dtrain" in caplog.text
    assert read_history(run)["epoch"].tolist() == [1, 2, 3]


def test_another_shape_is_refused_by_the_parameters_name(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "resumable.py"
    changed.write_text((RECIPES / "resumable.py").read_text().replace("hidden: int = 6", "hidden: int = 8"))
    before = contents(run)
    with pytest.raises(AgreedError, match=r"model\.hidden was 6 and is 8 \(default of build_model\)"):
        start(run.parent, "accept=code", recipe=changed)
    head = "def __init__(self, hidden, dropout):\n"
    changed.write_text((RECIPES / "resumable.py").read_text().replace(head, f"{head}        hidden += 2\n"))
    with pytest.raises(AgreedError, match=r"layers\.0\.weight has shape \(6, 4\) in the file, and has shape \(8, 4\)"):
        start(run.parent, "accept=code", recipe=changed)
    changed.write_text((RECIPES / "resumable.py").read_text().replace("AdamW", "SGD"))
    with pytest.raises(AgreedError, match=r"the optimizer was AdamW and is SGD"):
        start(run.parent, "accept=code", recipe=changed)
    assert contents(run) == before


def test_a_new_run_from_one_checkpoint_leaves_the_old_one(run: Path) -> None:
    before = contents(run)
    start(run.parent, "run.name=fork", "epochs=2", resume=str(run / "checkpoints" / "epoch-1"))
    fork = run.parent / "fork"
    times = ["seconds", "samples_per_second"]
    assert read_history(fork).drop(columns=times).equals(read_history(run).drop(columns=times))
    assert contents(run) == before
    with pytest.raises(AgreedError, match=r"--resume .*nowhere: no checkpoint here"):
        start(run.parent, "run.name=fork2", resume=str(run / "nowhere"))


@pytest.mark.parametrize("left", ["nothing", "half a config", "config", "history"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(run: Path, left: str) -> None:
    whole = read_history(run)
    shutil.rmtree(run / "checkpoints")
    if left != "history":
        (run / "history.csv").unlink()
    if left in ("nothing", "half a config"):
        (run / "config.yaml").unlink()
    if left == "half a config":
        (run / ".config.yaml.part").write_text("rec")
    start(run.parent)
    times = ["seconds", "samples_per_second"]
    assert read_history(run).drop(columns=times).equals(whole.drop(columns=times))
    assert (run / "history-1.csv").exists() == (left == "history"), "nothing that was there is lost"
    assert not (run / ".config.yaml.part").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "thesis.tex").write_text("mine")
    with pytest.raises(AgreedError, match="it contains no run"):
        start(tmp_path)
    assert contents(tmp_path) == {"it/thesis.tex": b"mine"}


def test_history_and_leftovers_after_a_kill_within_the_first_epoch(run: Path) -> None:
    """The row was written, and its checkpoint was not."""
    whole = read_history(run)
    saved = run / "checkpoints"
    (saved / "epoch-1").rename(saved / ".epoch-1.part")
    shutil.rmtree(saved / "epoch-2")
    for path in saved.glob("epoch-2-*"):
        shutil.rmtree(path)
    start(run.parent)
    times = ["seconds", "samples_per_second"]
    assert read_history(run).drop(columns=times).equals(whole.drop(columns=times))
    assert [path.name for path in saved.iterdir() if path.name.startswith(".")] == []


def test_early_stopping_counts_what_was_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never = ["early_stopping.monitor=samples_seen", "early_stopping.patience=3"]
    with pytest.raises(Exception, match=r"monitor = 'samples_seen' \(command line\): no such column in the history"):
        start(tmp_path, *never)
    shutil.rmtree(tmp_path / "it")
    # The epoch's number only grows, so that no epoch after the first is a new best.
    watch = ["early_stopping.monitor=epoch", "early_stopping.mode=min", "early_stopping.patience=3"]
    start(tmp_path, *watch, "epochs=2")
    run = start(tmp_path, *watch, "epochs=9")
    assert read_history(run)["epoch"].tolist() == [1, 2, 3, 4], "one best, and three without"
    capsys.readouterr()
    start(tmp_path, *watch, "epochs=9")
    out = capsys.readouterr().out
    assert "is complete: 4 epochs. It was stopped early after epoch 4 of 9: no lower epoch for 3 epochs" in out
    assert "Increase early_stopping.patience, or choose another run.name." in out


def other_ranks(world: World, folder: str, words: list[str]) -> str:
    try:
        start(Path(folder), *words, world=world)
    except AgreedError as error:
        return str(error)
    return "trained"


def test_other_ranks_of_per_rank_batches_are_refused_with_the_switch_that_allows_it(run: Path) -> None:
    before = contents(run)
    told = run_ranks(other_ranks, 2, folder=str(run.parent), words=["epochs=3"])
    assert told[0] == told[1]
    assert "the run had 1 rank and now has 2" in told[0] and "checkpoint.change_ranks=true" in told[0]
    assert contents(run) == before
    shutil.rmtree(run / "checkpoints" / "epoch-2")  # the last one is now within an epoch
    more = ["epochs=2", "checkpoint.change_ranks=true"]
    assert run_ranks(other_ranks, 2, folder=str(run.parent), words=more) == ["trained"] * 2
    assert read_history(run)["epoch"].tolist() == [1, 2]
    found = find_good(run / "checkpoints")
    assert found is not None and found.saved.facts["ranks"] == 2
    assert found.saved.epoch == 2 and found.saved.step is None


def test_an_optimizer_that_only_the_step_knows(tmp_path: Path) -> None:
    recipe = tmp_path / "own.py"
    text = (RECIPES / "resumable.py").read_text()
    text = text.replace(
        "def build_optimizer(model, lr: float = 0.01):\n    return ", "def make(model, lr=0.01):\n    return "
    )
    text = text.replace("def build_scheduler(", "def unused(")
    text = text.replace("    average = torch", "    global own\n    own = make(model)\n    average = torch").replace(
        "    average.update_parameters(model)\n    return loss, ",
        "    own.zero_grad()\n    loss.backward()\n    own.step()\n    average.update_parameters(model)\n    return loss.detach(), ",
    )
    recipe.write_text(text)
    whole = start(tmp_path / "whole", "epochs=3", recipe=recipe)
    start(tmp_path / "cut", "epochs=2", recipe=recipe)
    cut = start(tmp_path / "cut", "epochs=3", recipe=recipe)
    times = ["seconds", "samples_per_second"]
    assert read_history(cut).drop(columns=times).equals(read_history(whole).drop(columns=times))


def test_the_minutes_are_agreed_on(tmp_path: Path) -> None:
    words = ["checkpoint.every_minutes=0.0001", "checkpoint.keep_last=50", "epochs=1"]
    start(tmp_path, *words)
    names = {path.name for path in (tmp_path / "it" / "checkpoints").iterdir()}
    assert "epoch-1" in names and len(names) > 3


def test_a_stall_is_in_the_manifest_and_state_holds_all(run: Path) -> None:
    facts: dict[str, Any] = json.loads((run / "checkpoints" / "epoch-2" / "manifest.json").read_text())
    assert 0 < facts["stall_seconds"] < 60
    assert facts["torch"] == str(torch.__version__)
    assert facts["config"]["train"]["epochs"] == 2
    state = json.loads((run / "checkpoints" / "epoch-2" / "state.json").read_text())
    named = dict(state["dict"])
    assert {key for key, _ in named["others"]["dict"]} == {"average"}


@pytest.mark.parametrize("ranks", some([2], [1]))
def test_weights_that_are_not_finite_are_not_saved(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    """A finite loss had a gradient that was not: what it left is no checkpoint to go on from."""
    words = ["train", recipes / "tied.py", "-n", ranks, "--cpu", "run.name=it", "nan_at=2", "checkpoint.every_steps=1"]
    words += ["checkpoint.asynchronous=false", "checkpoint.keep_last=1"]
    for step in (2, 3):  # the second of each start
        done = dtrain(*words)
        assert done.code == 1
        told = f"after train step {step} of epoch 1 the weights are NaN or infinite (encode.weight, "
        assert done.err.count(told) == 1, done.text
        assert [path.name for path in (dtrain.folder / "runs/it/checkpoints").iterdir()] == [f"epoch-1-step-{step - 1}"]
    assert "resuming from runs/it/checkpoints/epoch-1-step-1" in done.out
    done = dtrain(*words, "train.nan=ignore", "run.name=kept", "epochs=1")
    assert done.code == 0, done.text
